"""The utterances of a request, their limits and their ends."""

import dataclasses

import numpy as np
import pytest
from request_driver import (
    CONFIG,
    END,
    FRAME_MS,
    LONG,
    NO_CODES,
    Q,
    assert_prompt,
    begin,
    codes,
    frames_for,
    join,
    kinds,
    loop,
    play,
)

from csm_jax import InputError, Request, Segment
from csm_jax.prompt.splitting import split_text


def test_every_part_is_context_of_the_next_part():
    """After the context, in the same voice, up to its end of speech."""
    before = Segment(7, "before", codes=codes(9))
    state, notices = begin(Request(LONG, 4, [before], seed=5))
    generated = [codes(30, 1), codes(40, 2), codes(50, 3)]
    utterances, released, _ = play(state, *([join(part, END)] for part in generated))
    parts = split_text(LONG)
    assert len(parts) == 3
    turns = [Segment(4, text, codes=part) for text, part in zip(parts, generated, strict=True)]
    for index, utterance in enumerate(utterances):
        assert_prompt(utterance, before, *turns[:index], text=parts[index], speaker=4)
        np.testing.assert_array_equal(released[index], generated[index])
    assert kinds(notices) == []


def test_frames_after_the_end_are_ignored():
    """A batch continues beside a row that has ended."""
    state, _ = begin(Request("Hi."))
    state.next_utterance()
    step = state.accept(join(codes(5), END, codes(3, 1), END))
    np.testing.assert_array_equal(step.released, codes(5))
    assert step[1:3] == (None, True)


@pytest.mark.parametrize("guard", ["on", "off"])
def test_frames_beyond_the_limit_are_ignored(guard):
    state, _ = begin(Request("Hi.", max_audio_length_ms=20 * FRAME_MS, guard=guard))
    state.next_utterance()
    np.testing.assert_array_equal(state.accept(codes(40)[:15]).released, codes(40)[:15])
    step = state.accept(codes(40)[15:])
    np.testing.assert_array_equal(step.released, codes(40)[15:20])
    assert step[1:3] == (None, True)


def test_every_part_and_every_attempt_has_its_own_seed():
    def seeds(seed: int) -> list[int]:
        utterances, _, rewinds = play(
            begin(Request(LONG, seed=seed))[0],
            [join(codes(8), loop(40)), join(codes(11), loop(40, 1)), join(codes(20), END)],
            [join(codes(8), END)],
            [join(codes(8), END)],
        )
        assert utterances[0].seed == seed  # a text of one part has the request's own seed
        return [u.seed for u in utterances] + [r.seed for part in rewinds for r in part]

    assert len(set(seeds(5))) == 5
    assert seeds(5) == seeds(5)
    assert not set(seeds(5)) & set(seeds(6))
    for seed in (-1, 2**70):
        assert len(set(seeds(seed))) == 5


# --- Limits and ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("guard", ["on", "off"])
def test_the_limit_is_for_all_parts_together(guard):
    state, notices = begin(Request(LONG, max_audio_length_ms=50 * FRAME_MS, guard=guard))
    parts = [join(codes(30), END)], [codes(99, 1)]
    utterances, released, _ = play(state, *parts)
    assert [utterance.max_frames for utterance in utterances] == [50, 20]
    np.testing.assert_array_equal(join(*released), join(codes(30), codes(99, 1)[:20]))
    assert kinds(notices) == ["cut"]
    assert notices[0].message.startswith("the speech was cut at 4 s and 1 of 3 parts of the text")


@pytest.mark.parametrize(("num_frames", "missing"), [(29, 1), (30, 2)])
def test_the_notice_counts_missing_parts(num_frames, missing):
    """The last frame that is allowed goes to the next part, if there is one."""
    state, notices = begin(Request(LONG, max_audio_length_ms=30 * FRAME_MS + 79))
    utterances, _, _ = play(state, [join(codes(num_frames), END)], [codes(9)])
    assert [utterance.max_frames for utterance in utterances] == [30, 1][: 3 - missing]
    assert kinds(notices) == ["cut"]
    assert f"{missing} of 3 parts of the text are missing" in notices[0].message


@pytest.mark.parametrize("num_frames", [19, 20, 21])
def test_speech_is_cut_at_its_limit(num_frames):
    """The end of speech is a frame of its own, which is not generated at the limit."""
    state, notices = begin(Request("Hi.", max_audio_length_ms=20 * FRAME_MS))
    _, (released,), _ = play(state, [join(codes(num_frames), END)])
    np.testing.assert_array_equal(released, codes(num_frames)[:20])
    assert kinds(notices) == ["cut"] * (num_frames >= 20)
    if notices:
        assert "at 1.6 s and it may lack its end: raise max_audio" in notices[0].message


def test_the_default_limit_grows_with_the_text():
    """It is 10 s, or the longest speech of the text if that is more."""
    long = "x" * 250
    for text, frames in (("Hi.", 125), (long, frames_for(long))):
        utterance = begin(Request(text, guard="off"))[0].next_utterance()
        assert utterance.max_frames == frames


def test_the_default_limit_is_the_models():
    longer = dataclasses.replace(CONFIG, default_max_audio_length_ms=90_000)
    request = Request("Hi.", guard="off")
    assert begin(request, config=longer)[0].next_utterance().max_frames == 1125


def test_a_part_that_fills_the_window_is_cut_with_a_notice():
    """However the next part ends; the notice names no limit, for a higher one would not help."""
    two = " ".join(letter * 200 + "." for letter in "ab")
    state, notices = begin(Request(two, guard="off"), max_seq_len=206 + 1 + 60)
    _, released, _ = play(state, [codes(400)], [join(codes(10), END)])
    assert [len(part) for part in released] == [60, 10]
    assert kinds(notices) == ["cut"]
    (cut,) = notices
    assert "max_audio_length_ms" not in cut.message


@pytest.mark.parametrize("guard", ["on", "off"])
def test_a_request_without_frames_gives_a_notice(guard):
    state, notices = begin(Request("Hi.", guard=guard))
    _, (released,), _ = play(state, [END])
    assert released.shape == (0, Q)
    assert kinds(notices) == ["nothing_said"]
    assert notices[0].message == "the model generated no speech for 'Hi.': try another seed"


def test_a_part_without_frames_gives_no_notice():
    """It is text without audio in the context of the next part."""
    state, notices = begin(Request(LONG))
    utterances, _, _ = play(state, [END], [join(codes(20), END)], [END])
    first, second, third = split_text(LONG)
    turns = Segment(0, first, codes=NO_CODES), Segment(0, second, codes=codes(20))
    assert_prompt(utterances[2], *turns, text=third)
    assert kinds(notices) == []


# --- Requests that are refused -------------------------------------------------------------------


WRONG = {
    "empty": ({"text": " \n"}, "the text is empty"),
    "guard": ({"guard": "maybe"}, "guard is maybe, but must be on or off"),
    "no frame": ({"max_audio_length_ms": 79}, "max_audio_length_ms is 79, but one frame takes 80"),
    "negative": ({"max_audio_length_ms": -1}, "max_audio_length_ms is -1"),
    "not a number": ({"max_audio_length_ms": float("nan")}, "max_audio_length_ms is nan"),
    "endless": ({"max_audio_length_ms": float("inf")}, "max_audio_length_ms is inf"),
    "context": (
        {"context": [Segment(0, "a", codes=codes(3)[:, 1:])]},
        r"codes have shape \[3, 6\]",
    ),
    "silent context": ({"context": [Segment(0, "")]}, "the text is empty"),
}


@pytest.mark.parametrize(("values", "message"), WRONG.values(), ids=WRONG)
def test_bad_requests_are_refused(values, message):
    with pytest.raises(InputError, match=message) as error:
        begin(Request(**({"text": "Hi."} | values)))
    assert "\n" not in str(error.value)


def test_one_frame_is_the_shortest_limit():
    assert begin(Request("Hi.", max_audio_length_ms=80))[0].next_utterance().max_frames == 1
