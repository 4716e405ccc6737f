"""Words of a text, and the rows of a prompt that stand for them."""

import dataclasses
import itertools

import numpy as np
import pytest

from csm_jax.config import tiny
from csm_jax.inference.alignment.words import row_weights, word_spans
from csm_jax.loading import BUNDLED, open_source
from csm_jax.prompt.tokenizer import byte_tokenizer

TEXTS = {
    "Hello, world!": ["Hello,", "world!"],
    "twenty-one  apples": ["twenty-one", "apples"],
    "It is 3.14 - or 5 %.": ["It", "is", "3.14 -", "or", "5", "%."],
    '"Quoted" … and (more)': ['"Quoted" …', "and", "(more)"],
    "… so it goes": ["… so", "it", "goes"],
    "你好, 世界。": ["你", "好,", "世", "界。"],
    "カ\u3099ラス": ["カ\u3099", "ラ", "ス"],
    "naïve café": ["naïve", "café"],
    "well done 👍": ["well", "done", "👍"],
    "안녕 하세요": ["안녕", "하세요"],
    "... ?": ["... ?"],
}


@pytest.mark.parametrize(("text", "words"), TEXTS.items())
def test_words_are_those_of_the_text(text, words):
    assert [text[start:end] for start, end in word_spans(text)] == words


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_in_order_and_leave_out_only_white_space(text):
    spans = word_spans(text)
    covered = "".join(text[start:end] for start, end in spans)
    assert "".join(covered.split()) == "".join(text.split())
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))


def test_each_byte_belongs_to_the_word_that_it_is_in():
    """With one row for a byte, after BOS and `[0]`, the rows are known."""
    text = "né 你 x"
    weights = row_weights(text, 0, byte_tokenizer(tiny()), tiny())
    owners = [-1, *[-1] * 3, 0, 0, 0, -1, 1, 1, 1, -1, 2, -1]
    assert weights.shape == (len(owners), 3)
    for row, owner in zip(weights, owners, strict=True):
        expected = np.zeros(3)
        if owner >= 0:
            expected[owner] = 1
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("text", ["hi ho", "  hi ho"])
def test_a_space_after_the_speaker_belongs_to_no_word(text):
    """The rows are BOS, `[0] hi ho` and EOS, since the model was trained without other spaces."""
    config = dataclasses.replace(tiny(), space_after_speaker=True)
    weights = row_weights(text, 0, byte_tokenizer(config), config)
    owners = [weights[:, word].nonzero()[0].tolist() for word in (0, 1)]
    assert (len(weights), owners) == (11, [[5, 6], [8, 9]])


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_rows_belong_to_words_or_to_none(text):
    source = open_source("demo")
    tokenizer = source.tokenizer
    weights = row_weights(text, 1, tokenizer, source.config)
    assert len(weights) == len(tokenizer.encode(f"[1]{text}"))
    sums = weights.sum(axis=1)
    assert ((np.abs(sums - 1) < 1e-6) | (sums == 0)).all()
    assert (weights.sum(axis=0) > 0).all(), "a word without a row"


def test_a_token_that_spans_two_words_is_shared_by_them():
    class OneToken:
        def encode_with_offsets(self, text):
            return [(1, 0, 0), (7, 0, len(text)), (2, len(text), len(text))]

    weights = row_weights("你好吗", 0, OneToken(), tiny())
    np.testing.assert_allclose(weights[1], [1 / 3] * 3)


def test_offsets_of_tokens_are_those_of_the_ids():
    for tokenizer in (open_source("demo").tokenizer, byte_tokenizer(tiny())):
        text = "[0]Zoë, 你好 42"
        rows = tokenizer.encode_with_offsets(text)
        assert [row[0] for row in rows] == tokenizer.encode(text)
        assert all(0 <= start <= end <= len(text) for _, start, end in rows)
    assert BUNDLED["demo"].is_dir()
