"""Tokenizers: special tokens, files in both formats, and damaged files."""

import dataclasses
import io
import json
import os

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from csm_jax import config
from csm_jax.errors import CheckpointError, InputError, OutputError
from csm_jax.prompt.tokenizer import (
    BPETokenizer,
    SentencePieceTokenizer,
    byte_tokenizer,
    load_tokenizer,
)

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SENTENCES = [
    "Hello from Sesame, how are you today?",
    "The quick brown fox jumps over the lazy dog, 1234 times.",
    "I'm sure they'll say it's what we've heard.",
    "Grüße aus Köln, naïve café; привет, мир! こんにちは世界。",
    "  leading and trailing spaces  \n\nand lines\t.",
]
TEXTS = [
    *SENTENCES,
    "[0]Hello from Sesame.",
    "[12] unseen words: zyzzyva, 98765",
    "",
    " ",
    "\n",
    "é e\u0301 🎉👩‍👩‍👧 \u200b\ufeff\x00",
    "a" * 3000,
]
# Llama 3's pattern for words.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe():
    """A small tokenizer like Llama 3's: byte-level BPE, with BOS and EOS as added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


def post_processor(tokenizer, template):
    special = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    return processors.TemplateProcessing(single=template, special_tokens=special)


def config_of(tokenizer):
    ids = config.TextTokenIds(bos=tokenizer.token_to_id(BOS), eos=tokenizer.token_to_id(EOS))
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    return dataclasses.replace(config.tiny(), text_vocab_size=size, text_token_ids=ids)


@pytest.fixture(scope="module")
def bpe_json():
    return train_bpe().to_str()


@pytest.fixture
def bpe(bpe_json):
    return tokenizers.Tokenizer.from_str(bpe_json)


def train_sentencepiece(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=90,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def sentencepiece_model():
    return train_sentencepiece()


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


# Byte-level BPE


def test_bpe_equals_the_references_tokenizer(tmp_path, bpe):
    """csm `generator.py` uses transformers' fast tokenizer with a template of BOS and EOS."""
    transformers = pytest.importorskip("transformers")
    bpe.save(str(tmp_path / "tokenizer.json"))
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=BOS, eos_token=EOS
    )
    reference._tokenizer.post_processor = post_processor(bpe, f"{BOS}:0 $A:0 {EOS}:0")
    ours = load_tokenizer(tmp_path, config_of(bpe))
    for text in TEXTS:
        assert ours.encode(text) == reference.encode(text)
    assert len(ours.encode(SENTENCES[0])) < len(SENTENCES[0]) / 2, "the merges have no effect"


@pytest.mark.parametrize(
    "template",
    [
        f"{BOS}:0 $A:0 {EOS}:0",
        f"{BOS}:0 $A:0",
        f"$A:0 {EOS}:0",
        f"{BOS}:0 {BOS}:0 $A:0 {EOS}:0 {EOS}:0",
        f"{EOS}:0 $A:0 {BOS}:0",
    ],
)
def test_the_files_post_processor_is_not_used(bpe, template):
    ids = config_of(bpe).text_token_ids
    plain = BPETokenizer(bpe.to_str(), ids)
    bpe.post_processor = post_processor(bpe, template)
    ours = BPETokenizer(bpe.to_str(), ids)
    for text in TEXTS:
        encoded = ours.encode(text)
        assert encoded == plain.encode(text)
        assert (encoded[0], encoded[-1]) == (ids.bos, ids.eos)
        assert not {ids.bos, ids.eos} & set(encoded[1:-1])


def test_the_files_truncation_and_padding_are_not_used(bpe):
    ids = config_of(bpe).text_token_ids
    plain = BPETokenizer(bpe.to_str(), ids)
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50, pad_id=ids.eos)
    ours = BPETokenizer(bpe.to_str(), ids)
    assert ours.encode(SENTENCES[0]) == plain.encode(SENTENCES[0])


def test_special_tokens_in_a_text_are_encoded_as_text(bpe):
    ids = config_of(bpe).text_token_ids
    text = f"[0]a{EOS}b{BOS}"
    encoded = BPETokenizer(bpe.to_str(), ids).encode(text)
    assert (encoded.count(ids.bos), encoded.count(ids.eos)) == (1, 1)
    assert bpe.decode(encoded[1:-1]) == text


def test_bos_and_eos_are_those_of_the_config(bpe_json):
    ids = config.TextTokenIds(bos=7, eos=9)
    encoded = BPETokenizer(bpe_json, ids).encode("hello")
    assert (encoded[0], encoded[-1]) == (7, 9)


# Bytes


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokenizer_has_one_id_per_byte(text):
    sizes = config.tiny()
    encoded = byte_tokenizer(sizes).encode(text)
    assert (encoded[0], encoded[-1]) == (sizes.text_token_ids.bos, sizes.text_token_ids.eos)
    symbols = dict(zip(_bytes_in_gpt2_order(), range(256), strict=True))
    assert encoded[1:-1] == [symbols[byte] for byte in text.encode()]


def _bytes_in_gpt2_order():
    """Bytes in the order of GPT-2's symbols: printable ones first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


@pytest.mark.parametrize("sizes", [config.tiny(), config.csm_1b()])
def test_byte_tokenizer_fits_the_presets(tmp_path, sizes):
    byte_tokenizer(sizes).save(tmp_path)
    loaded = load_tokenizer(tmp_path, sizes)
    assert loaded.encode("[0]héllo") == byte_tokenizer(sizes).encode("[0]héllo")


# SentencePiece


@pytest.mark.parametrize("options", [{}, {"bos_id": 5, "eos_id": 0, "unk_id": 3}])
def test_sentencepiece_equals_the_references_tokenizer(tmp_path, options):
    model = train_sentencepiece(**options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = load_tokenizer(tmp_path, config.tiny())
    for text in [*TEXTS, "<s>a</s>"]:
        assert ours.encode(text) == reference.encode(text, add_bos=True, add_eos=True)
    assert ours.encode("")[0] == options.get("bos_id", 1)


@pytest.mark.parametrize("missing", [{"bos_id": -1}, {"eos_id": -1}])
def test_a_model_without_bos_or_eos_is_refused(tmp_path, missing):
    (tmp_path / "a.model").write_bytes(train_sentencepiece(**missing))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path, config.tiny())
    one_line(caught, tmp_path / "a.model", "no BOS or no EOS", "-1")


# Files


def test_tokenizer_files_of_a_directory_are_tried_in_order(
    tmp_path, bpe, bpe_json, sentencepiece_model
):
    sizes = config_of(bpe)
    (tmp_path / "spm_32k.model").write_bytes(sentencepiece_model)
    assert isinstance(load_tokenizer(tmp_path, sizes), SentencePieceTokenizer)
    (tmp_path / "another.model").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path, sizes)
    one_line(caught, tmp_path, "2 other *.model files")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    assert isinstance(load_tokenizer(tmp_path, sizes), SentencePieceTokenizer)
    (tmp_path / "tokenizer.json").write_text(bpe_json)
    assert isinstance(load_tokenizer(tmp_path, sizes), BPETokenizer)
    named = load_tokenizer(tmp_path / "spm_32k.model", sizes)
    assert isinstance(named, SentencePieceTokenizer)


@pytest.mark.parametrize("indent", [None, 2])
def test_bpe_is_saved_byte_for_byte(tmp_path, bpe, bpe_json, indent):
    content = json.dumps(json.loads(bpe_json) | {"padding": None}, indent=indent) + "\r\n"
    (tmp_path / "tokenizer.json").write_bytes(content.encode())
    (tmp_path / "copy").mkdir()
    load_tokenizer(tmp_path, config_of(bpe)).save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == content.encode()


def test_sentencepiece_is_saved_byte_for_byte(tmp_path, sentencepiece_model):
    (tmp_path / "other_name.model").write_bytes(sentencepiece_model)
    (tmp_path / "copy").mkdir()
    load_tokenizer(tmp_path, config.tiny()).save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == sentencepiece_model


def test_saving_to_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(OutputError) as caught:
        byte_tokenizer(config.tiny()).save(tmp_path / "missing")
    one_line(caught, tmp_path / "missing", "No such file or directory")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "No such file"),
        ("tokenizer.model", None, "No such file"),
        ("tokenizer.json", b"", "not a tokenizer.json"),
        ("tokenizer.json", b"{\n\n}", "not a tokenizer.json"),
        ("tokenizer.json", b'{"version": "1\\n0"}', "not a tokenizer.json"),
        ("tokenizer.json", b"[1,\n2", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "utf-8"),
        ("tokenizer.model", b"", "not a SentencePiece model"),
        ("tokenizer.model", b"abc\n" * 100, "not a SentencePiece model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path / name, config.tiny())
    one_line(caught, tmp_path / name, says)


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_directory_without_a_tokenizer_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path / name, config.tiny())
    one_line(caught, tmp_path / name, "tokenizer.json")


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path, bpe, sentencepiece_model):
    bpe.add_tokens(["an added token"])
    (tmp_path / "tokenizer.json").write_text(bpe.to_str())
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model).vocab_size()
    last = {"tokenizer.json": bpe.token_to_id("an added token"), "tokenizer.model": pieces - 1}
    for name, largest in last.items():
        fits = dataclasses.replace(config_of(bpe), text_vocab_size=largest + 1)
        assert load_tokenizer(tmp_path / name, fits).vocab_size == largest + 1
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(
                tmp_path / name, dataclasses.replace(config_of(bpe), text_vocab_size=largest)
            )
        one_line(caught, tmp_path / name, largest, f"{largest} text embeddings")


@pytest.mark.parametrize("which", ["bos", "eos"])
def test_bos_and_eos_beyond_the_vocabulary_are_refused(tmp_path, bpe, which):
    (tmp_path / "tokenizer.json").write_text(bpe.to_str())
    ids = dataclasses.replace(config_of(bpe).text_token_ids, **{which: 5000})
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path, dataclasses.replace(config_of(bpe), text_token_ids=ids))
    one_line(caught, 5000)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_text_that_is_not_unicode_is_refused(sentencepiece_model, kind):
    tokenizer = (
        byte_tokenizer(config.tiny())
        if kind == "bytes"
        else SentencePieceTokenizer(sentencepiece_model)
    )
    with pytest.raises(InputError) as caught:
        tokenizer.encode("ab\udcff")
    one_line(caught, "position 2")
