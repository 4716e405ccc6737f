"""Exports with transformers' own processor: the same prompts, and the same speech."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import fixtures
import torch
import transformers

import csm_jax
from csm_jax.checkpoints import peft_files
from csm_jax.convert import __main__ as convert
from csm_jax.convert.processor_files import MAX_FRAMES
from csm_jax.convert.sentencepiece_files import to_tokenizers
from csm_jax.loading import BUNDLED, open_source
from csm_jax.model.layers import LowRank
from csm_jax.model.lora import LoRAConfig, init_adapters

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
    assert model.generation_config.max_new_tokens == MAX_FRAMES
    assert model.depth_decoder.generation_config.top_k == csm_jax.Sampling().top_k


def test_the_sentencepiece_model_of_demo_has_an_equal_in_transformers_form():
    """On random sentences, punctuation and characters that it does not know."""
    import tokenizers

    source = open_source("demo")
    content = to_tokenizers((BUNDLED["demo"] / "tokenizer.model").read_bytes())
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    random = np.random.default_rng(0)
    letters = list("eeetaonishrdlu    .,!?'-;:0123456789[]ABCéÅﬁ語…\t")
    for _ in range(300):
        text = "".join(random.choice(letters, random.integers(40)))
        ours = source.tokenizer.encode(text)[1:-1]
        assert theirs.encode(text, add_special_tokens=False).ids == ours, repr(text)


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
