"""Times of characters from times of words."""

import random

import pytest

from csm_jax import Word
from csm_jax.inference.alignment.words import word_spans
from csm_jax.serve.api.character_times import (
    CharacterTimes,
    TextTimes,
    Timed,
    WordPlaces,
    pair_words,
)

TEXTS = [
    "one two three",
    "  One,\ttwo  \n three - four! ",
    '"Hm," she said: 3.14 (or so) is 你好 π. 👍',
    "…",
    "a",
]


def words_of(text: str, seed: int) -> list[Word]:
    """Words with random times in order, some of which are not spoken."""
    numbers, end, words = random.Random(seed), 0.0, []
    for first, last in word_spans(text):
        start = end + numbers.choice([0.0, 0.3])
        is_spoken = numbers.random() < 0.8
        end = start + numbers.random() if is_spoken else start
        words.append(Word(text[first:last], start, end, float(is_spoken), is_spoken))
    return words


def joined(pieces: list[dict]) -> tuple[str, list[float], list[float]]:
    names = "characters", "character_start_times_seconds", "character_end_times_seconds"
    characters, starts, ends = ([x for each in pieces for x in each[name]] for name in names)
    return "".join(characters), starts, ends


def times_of(text: str, spoken: str, words: list[Word], name: str, size: int = 1):
    """The times of a text, to which words are added a few at a time."""
    times, pieces = TextTimes(text, spoken), []
    for start in range(0, len(words), size):
        times.add(words[start : start + size], is_over=False)
        pieces.append(times.take()[name])
    times.add([], is_over=True)
    pieces.append(times.take()[name])
    return joined([piece for piece in pieces if piece])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("seed", range(5))
def test_characters_are_the_text_in_order_and_within_their_words(text, seed):
    words = words_of(text, seed)
    characters, starts, ends = times_of(text, text, words, "alignment")
    assert characters == text
    assert all(start <= end for start, end in zip(starts, ends, strict=True))
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    for (first, last), word in zip(word_spans(text), words, strict=True):
        assert starts[first] == pytest.approx(word.start, abs=1e-3)
        assert ends[last - 1] == pytest.approx(word.end, abs=1e-3)
        middle = [starts[i] for i in range(first, last)]
        assert middle == pytest.approx(
            [word.start + (word.end - word.start) * i / len(middle) for i in range(len(middle))],
            abs=1e-3,
        )


@pytest.mark.parametrize("size", [2, 100])
def test_the_times_do_not_depend_on_when_words_become_known(size):
    text = TEXTS[2]
    words = words_of(text, 3)
    at_once, one_by_one = (times_of(text, text, words, "alignment", n) for n in (size, 1))
    assert at_once == one_by_one


def test_text_that_is_not_spoken_any_more_ends_with_the_speech():
    characters, starts, ends = times_of("one two", "one two", words_of("one", 1), "alignment")
    assert characters == "one two"
    assert set(starts[3:] + ends[3:]) == {ends[2]}


def test_words_that_are_not_in_the_text_are_left_out():
    places = WordPlaces("one two")
    found = [places.find([Word(text, 0, 1, 1)]) for text in ("one", "ten", "two")]
    assert [[(each.first, each.last) for each in one] for one in found] == [[(0, 3)], [], [(4, 7)]]


def test_a_text_that_was_normalized_has_the_times_of_what_is_spoken_for_it():
    written = "**3** tickets 🎟 for $4.50, please"
    spoken = "three tickets for four dollars and fifty cents, please"
    words = [Word(text, i, i + 0.5, 1.0) for i, text in enumerate(spoken.split())]
    characters, starts, ends = times_of(written, spoken, words, "alignment")
    assert characters == written
    for text, start, end in [("**3**", 0, 0.5), ("for", 2, 2.5), ("$4.50,", 3, 7.5)]:
        first = written.index(text)
        assert (starts[first], ends[first + len(text) - 1]) == (start, end)
    assert times_of(written, spoken, words, "normalized_alignment")[0] == spoken


@pytest.mark.parametrize(
    ("written", "spoken", "pairs"),
    [
        ("a b", "a b", [("a", "a"), ("b", "b")]),
        ("a 1 b", "a x y b", [("a", "a"), ("1", "x y"), ("b", "b")]),
        ("a # b", "a b", [("a", "a"), ("b", "b")]),
        ("1", "x y", [("1", "x y")]),
        ("", "a", []),
    ],
)
def test_words_that_differ_are_paired_with_what_stands_for_them(written, spoken, pairs):
    found = [(written[a:b], spoken[c:d]) for a, b, c, d in pair_words(written, spoken)]
    assert found == pairs


def test_times_of_characters_never_go_back():
    times = CharacterTimes("abcd")
    times.add([Timed(0, 2, 0.0, 1.0), Timed(2, 4, 0.5, 0.7)])
    assert times.ends[1] <= times.starts[2] <= times.ends[3]
