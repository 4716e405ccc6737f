"""Exports with transformers' own processor: the same prompts, and the same speech."""

import io
import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import fixtures
import sentencepiece
import tokenizers
import torch
import transformers

import csm_jax
from csm_jax.checkpoints import native_format, peft_files
from csm_jax.convert import __main__ as convert
from csm_jax.convert.sentencepiece_files import to_tokenizers
from csm_jax.loading import BUNDLED, open_source
from csm_jax.model.layers import LowRank
from csm_jax.model.lora import LoRAConfig, init_adapters
from csm_jax.prompt.tokenizer import load_tokenizer

CONFIG = csm_jax.tiny()


def turn(text: str, speaker: int = 0, audio=None) -> dict:
    content = [{"type": "text", "text": text}]
    content += [] if audio is None else [{"type": "audio", "audio": audio}]
    return {"role": str(speaker), "content": content}


def prompt_of(processor, *turns) -> dict:
    return processor.apply_chat_template(list(turns), tokenize=True, return_dict=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "hf"
    assert convert.run(["--source=demo", f"--out={out}", "--to=hf"]) == 0
    return out


@pytest.fixture(scope="module")
def processor(demo):
    return transformers.AutoProcessor.from_pretrained(demo)


@pytest.mark.parametrize(
    "text", ["One two three.", "It's 8%, isn't it?", "  two  spaces ", "Grüße!", ""]
)
def test_the_processor_makes_the_ids_of_our_tokenizer(processor, text):
    assert type(processor).__name__ == "CsmProcessor"
    tokenizer = open_source("demo").tokenizer
    got = prompt_of(processor, turn(text, 1))["input_ids"][0].tolist()
    assert got == tokenizer.encode(f"[1]{text}")


def test_an_audio_turn_has_an_id_for_every_frame(processor):
    source = open_source("demo")
    ids, frame = source.config.text_token_ids, source.config.codec.frame_size
    audio = np.random.default_rng(0).standard_normal(5 * frame - 7).astype(np.float32)
    inputs = prompt_of(processor, turn("One.", 0, audio), turn("Two.", 1))
    first, second = (source.tokenizer.encode(text) for text in ("[0]One.", "[1]Two."))
    assert inputs["input_ids"][0].tolist() == [*first, *[ids.audio] * 5, ids.audio_eos, *second]
    assert inputs["input_values"].shape[-1] == len(audio)


def test_the_exported_demo_speaks_as_it_does_here(demo, processor):
    model = transformers.CsmForConditionalGeneration.from_pretrained(demo, dtype=torch.float32)
    inputs = prompt_of(processor, turn("One two three."))
    greedy = {"do_sample": False, "depth_decoder_do_sample": False}
    theirs = model.generate(**inputs, **greedy, max_new_tokens=12)[0].numpy()
    ours = csm_jax.load("demo", "float32").generate_codes(
        "One two three.", 0, sampling=csm_jax.Sampling(greedy=True), max_audio_length_ms=12 * 80
    )
    np.testing.assert_array_equal(fixtures.up_to_the_end(theirs), ours)
    # Its own defaults are those of `Sampling`.
    assert model.generation_config.max_new_tokens == 125  # 10 s
    assert model.depth_decoder.generation_config.top_k == csm_jax.Sampling().top_k


def random_texts() -> list[str]:
    """Turns of letters, punctuation and characters that the tokenizers do not know."""
    random = np.random.default_rng(0)
    letters = list("eeetaonishrdlu    .,!?'-;:0123456789[]ABCéÅﬁ語…\t")
    return [f"[1]{''.join(random.choice(letters, random.integers(40)))}" for _ in range(300)]


def test_the_sentencepiece_model_of_demo_has_an_equal_in_transformers_form():
    source = open_source("demo")
    content = to_tokenizers((BUNDLED["demo"] / "tokenizer.model").read_bytes())
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in random_texts():
        ours = source.tokenizer.encode(text)[1:-1]
        assert theirs.encode(text, add_special_tokens=False).ids == ours, repr(text)


SENTENCES = ["one two three", "four five, six!", "the quick brown fox", "seven 7 eight 8?"] * 30


def train_sentencepiece(**options) -> bytes:
    model = io.BytesIO()
    common = {"vocab_size": 70, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, **(common | options)
    )
    return model.getvalue()


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": True, "vocab_size": 330},
        {"user_defined_symbols": ["[0]", "[1]"]},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity"},
    ],
)
def test_sentencepiece_models_have_an_equal_in_transformers_form(model_type, options):
    model = train_sentencepiece(model_type=model_type, **options)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizers(model)))
    for text in random_texts():
        got = ours.encode(text, add_special_tokens=False)
        assert got.ids == theirs.encode(text), (text, got.tokens, theirs.encode_as_pieces(text))


@pytest.mark.parametrize("model_type", ["word", "char"])
def test_other_sentencepiece_models_have_none(model_type):
    assert to_tokenizers(train_sentencepiece(model_type=model_type)) is None


@pytest.mark.parametrize("is_json", [False, True])
def test_a_checkpoint_with_a_unigram_tokenizer_is_exported(tmp_path, is_json):
    """As `tokenizer.model`, or as `tokenizer.json`, which has a list of pieces."""
    model = train_sentencepiece()
    name = "tokenizer.json" if is_json else "tokenizer.model"
    content = json.dumps(to_tokenizers(model)).encode() if is_json else model
    (tmp_path / name).write_bytes(content)
    tokenizer = load_tokenizer(tmp_path / name, CONFIG)
    source, out = tmp_path / "native", tmp_path / "hf"
    native_format.save(source, CONFIG, fixtures.params().items(), tokenizer)
    assert convert.run([f"--source={source}", f"--out={out}", "--to=hf"]) == 0
    processor = transformers.AutoProcessor.from_pretrained(out)
    got = prompt_of(processor, turn("five foxes, 8!", 1))["input_ids"][0].tolist()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = CONFIG.text_token_ids
    ends = (ids.bos, ids.eos) if is_json else (theirs.bos_id(), theirs.eos_id())
    assert got == [ends[0], *theirs.encode("[1]five foxes, 8!"), ends[1]]
    assert load_tokenizer(out, CONFIG).encode("[1]five foxes, 8!")[1:-1] == got[1:-1]


def test_a_native_checkpoint_without_processor_files_gets_them(native, tmp_path):
    out = tmp_path / "hf"
    assert convert.run([f"--source={native}", f"--out={out}", "--to=hf"]) == 0
    processor = transformers.AutoProcessor.from_pretrained(out)
    got = prompt_of(processor, turn("Hello, it's me.", 3))["input_ids"][0].tolist()
    assert got == fixtures.TOKENIZER.encode("[3]Hello, it's me.")


def test_adapters_are_merged_into_an_export(native, tmp_path):
    """They were dropped without a word."""
    random, config = np.random.default_rng(0), LoRAConfig(rank=2)
    adapters = {
        path: LowRank(low.down, random.standard_normal(low.up.shape).astype(np.float32))
        for path, low in init_adapters(CONFIG, config).items()
    }
    peft_files.write_adapters(tmp_path / "adapters", adapters, config, "base")
    flags = [f"--source={native}", f"--adapters={tmp_path / 'adapters'}"]
    assert convert.run([*flags, f"--out={tmp_path / 'hf'}", "--to=hf"]) == 0
    assert convert.run([*flags, f"--out={tmp_path / 'merged'}"]) == 0
    fixtures.assert_same_params(
        fixtures.tensors_of(tmp_path / "hf"), fixtures.loaded(tmp_path / "merged")
    )
