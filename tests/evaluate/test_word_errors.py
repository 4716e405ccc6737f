"""Word errors: against counts by hand and against jiwer."""

import random

import pytest

from csm_jax.errors import InputError
from csm_jax.evaluate.normalization import load_normalizer
from csm_jax.evaluate.word_errors import WordErrors, count_errors

# Text, what was heard, and by hand: substitutions, deletions, insertions, repeated words.
BY_HAND = [
    ("the cat sat", "the cat sat", (0, 0, 0, 0)),
    ("the cat sat", "", (0, 3, 0, 0)),
    ("", "the cat", (0, 0, 2, 0)),
    ("the cat sat", "the dog sat", (1, 0, 0, 0)),
    ("the cat sat", "cat sat", (0, 1, 0, 0)),
    ("the cat sat down", "the cat cat sat down", (0, 0, 1, 1)),
    # The phrase "cat sat" is said twice, whichever of the two is the added one.
    ("the cat sat down", "the cat sat cat sat down", (0, 0, 2, 2)),
    ("one two", "one one one two", (0, 0, 2, 2)),
    # As many edits as two replaced words, but here one word is left out and another is added.
    ("the cat", "cat sat", (0, 1, 1, 0)),
    ("we went home early", "we went to the house", (2, 0, 1, 0)),
]


@pytest.mark.parametrize(("text", "heard", "counts"), BY_HAND)
def test_word_errors_are_those_counted_by_hand(text, heard, counts):
    assert count_errors(text.split(), heard.split()) == WordErrors(len(text.split()), *counts)


def test_the_number_of_errors_is_that_of_jiwer():
    jiwer = pytest.importorskip("jiwer")
    source = random.Random(0)
    for _ in range(500):
        text, heard = (
            [source.choice("abcd") for _ in range(source.randint(least, 9))] for least in (1, 0)
        )
        counted = count_errors(text, heard)
        expected = jiwer.process_words(" ".join(text), " ".join(heard))
        edits = expected.substitutions + expected.deletions + expected.insertions
        assert counted.errors == edits
        assert counted.errors / counted.words == pytest.approx(expected.wer)
        assert counted.words - counted.deletions + counted.insertions == len(heard)
        assert counted.repeated <= counted.insertions


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("en", "Three, one - four!", ["3", "1", "4"]),
        ("en", "3-1-4", ["3", "1", "4"]),
        ("en", "One 1", ["1", "1"]),
        ("en", "7.997 and 1,250", [*"7997", "and", *"1250"]),
        ("en", "0117, 062 08", [*"0117", *"06208"]),
        ("en", "zero one one seven", [*"0117"]),
        ("en", "25 million at 10:30", [*"25000000", "at", *"1030"]),
        ("en", "twenty five million at ten thirty", [*"25000000", "at", *"1030"]),
        ("en", "12 dollars at 10:05", ["$", *"12", "at", *"1005"]),
        ("en", "twelve dollars at ten oh five", ["$", *"12", "at", *"1005"]),
        ("en", "$20.50 in the 1990s", ["$", *"2050", "in", "the", *"1990", "s"]),
        ("en", "the end of...", ["the", "end", "of"]),
        ("en", "Twenty percent of five dollars", ["2", "0", "%", "of", "$", "5"]),
        ("en", "It's the colour", ["it", "is", "the", "colour"]),
        ("de", "Grüße, Welt!", ["grüße", "welt"]),
        ("zh", "你好。世界", ["你", "好", "世", "界"]),
    ],
)
def test_texts_that_sound_alike_become_the_same_words(language, text, words):
    pytest.importorskip("transformers")
    assert load_normalizer(language)(text) == words


def test_a_language_that_is_no_code_is_refused():
    with pytest.raises(InputError, match="--language is e-n, but must be a code such as en"):
        load_normalizer("e-n")
