"""Marks of pauses in texts."""

import pytest

from csm_jax.errors import InputError
from csm_jax.inference.request import Request
from csm_jax.prompt.normalizing import normalize_text
from csm_jax.prompt.pauses import Piece, split_pauses

# The text, the silence before it, and its pieces with the silence after each.
SPLIT = {
    "One.": (0, [("One.", 0)]),
    "One. [pause:0.5s] Two.": (0, [("One.", 0.5), ("Two.", 0)]),
    "One [pause:250ms]two": (0, [("One", 0.25), ("two", 0)]),
    "[pause: 2 s] One": (2, [("One", 0)]),
    "One [PAUSE] two": (0, [("One", 0.5), ("two", 0)]),
    "One[pause:1s][pause:1s]two": (0, [("One", 2), ("two", 0)]),
    "One [pause:1s], [pause:1s] two": (0, [("One,", 2), ("two", 0)]),
    "Well [pause:1s].": (0, [("Well.", 1)]),
    'One <break time="500ms"/> two': (0, [("One", 0.5), ("two", 0)]),
    "One <break time='1.5s' /> two <break/>": (0, [("One", 1.5), ("two", 0.5)]),
    "你好[pause:1s]。": (0, [("你好。", 1)]),
    # No marks: other units, no numbers, other words.
    "[pause:1h] [pause:-1s] [pause:s] [paused]": (
        0,
        [("[pause:1h] [pause:-1s] [pause:s] [paused]", 0)],
    ),
}


@pytest.mark.parametrize("text", SPLIT)
def test_a_text_is_split_at_its_marks(text):
    before, pieces = SPLIT[text]
    assert split_pauses(text) == (before, [Piece(*piece) for piece in pieces])


@pytest.mark.parametrize("text", ["a[pause:61s]", "a" + "[pause:20s]b" * 4, "a[pause:999999ms]"])
def test_pauses_that_are_too_long_together_are_refused(text):
    with pytest.raises(InputError, match="at most 60 s are possible"):
        split_pauses(text)
    with pytest.raises(InputError, match="at most 60 s are possible"):
        Request(text, pauses=True)


def test_without_the_option_marks_are_text():
    request = Request("One. [pause:99s]")
    assert (request.spoken_text, request.pause_seconds) == (request.text, 0)


def test_the_transcript_has_no_marks():
    request = Request("[pause] One. [pause:1s] Two.", pauses=True)
    assert (request.spoken_text, request.pause_seconds) == ("One. Two.", 1.5)


@pytest.mark.parametrize("text", ["[pause:1s]", "[pause] . [pause]"])
def test_a_text_of_pauses_alone_is_refused(text):
    with pytest.raises(InputError, match="nothing to say"):
        Request(text, pauses=True)


def test_the_normalizer_leaves_marks():
    pytest.importorskip("num2words")
    text = '**5** cats [pause:0.5s] and 2 dogs <break time="10ms"/>'
    assert normalize_text(text) == ('five cats [pause:0.5s] and two dogs <break time="10ms"/>')
