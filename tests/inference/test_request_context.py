"""Which turns of the context fit the window, and which recordings are encoded."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from request_driver import (
    CONFIG,
    END,
    FRAME_MS,
    NO_CODES,
    StubModel,
    assert_prompt,
    begin,
    codes,
    frames_for,
    join,
    kinds,
    play,
)

from csm_jax import InputError, Request, Segment
from csm_jax.errors import RequestCancelledError
from csm_jax.inference import request_state
from csm_jax.inference.request_state import RequestState
from csm_jax.prompt.splitting import split_text
from csm_jax.prompt.turns import Turn


def context(*lengths: int) -> list[Segment]:
    """Turns that take these numbers of positions, 8 at least."""
    return [Segment(1, "hm", codes=codes(n - 8, i)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("spare", [0, 1, -1])
@pytest.mark.parametrize("max_audio_length_ms", [None, 10 * FRAME_MS])
def test_the_oldest_turns_are_dropped_to_leave_half_of_the_longest_speech(
    max_audio_length_ms, spare
):
    """They leave all of `max_audio_length_ms` if that is less."""
    turns = context(40, 20, 30)
    room = min(frames_for("Hi.") // 2, 10 if max_audio_length_ms else 125)
    text = 8  # BOS, "[0]Hi.", EOS
    request = Request("Hi.", 0, turns, max_audio_length_ms=max_audio_length_ms)
    state, notices = begin(request, max_seq_len=90 + text + room + 1 + spare)
    utterance = state.next_utterance()
    kept = turns if spare >= 0 else turns[1:]
    assert_prompt(utterance, *kept, text="Hi.")
    assert kinds(notices) == ["context_dropped"] * (spare < 0)
    if spare < 0:
        assert notices[0].message.startswith("the oldest 1 of 3 turns of context were left out")
    assert utterance.max_frames == (
        10 if max_audio_length_ms else room + (40 - 1) * (spare < 0) + max(spare, 0)
    )


def test_no_more_turns_are_dropped_than_necessary():
    # 8 positions for the text, 46 for its speech and one for its end; 20 for every turn.
    for window, kept in ((115, 3), (114, 2), (95, 2), (94, 1), (75, 1), (74, 0), (55, 0)):
        turns = context(20, 20, 20)
        state, notices = begin(Request("Hi.", 0, turns), max_seq_len=window)
        assert_prompt(state.next_utterance(), *turns[3 - kept :], text="Hi.")
        assert kinds(notices) == ["context_dropped"] * (kept < 3)
        if kept < 3:
            assert f"the oldest {3 - kept} of 3 turns" in notices[0].message


def test_the_parts_of_a_long_text_are_dropped_too():
    """There are never more frames than fit, and the last parts are complete."""
    text = " ".join(letter * 200 + "." for letter in "abcdefgh")
    parts = split_text(text)
    state, notices = begin(Request(text, guard="off"))
    generated = [codes(90, i) for i in range(len(parts))]
    utterances, _, _ = play(state, *([join(part, END)] for part in generated))
    assert len(utterances) == len(parts) == 8
    window = CONFIG.backbone.max_seq_len
    for index, utterance in enumerate(utterances):
        length = len(utterance.prompt[0])
        assert length + utterance.max_frames < window
        assert utterance.max_frames >= frames_for(parts[index]) // 2
        turn = 206 + 91
        kept = (length - 206) // turn
        assert kept == min(index, (window - 1 - 206 - frames_for(parts[index]) // 2) // turn)
        turns = zip(parts[index - kept : index], generated[index - kept : index], strict=True)
        assert_prompt(
            utterance, *(Segment(0, *t[:1], codes=t[1]) for t in turns), text=parts[index]
        )
    assert set(kinds(notices)) == {"context_dropped"}


@pytest.mark.parametrize("text", ["Hi.", "x" * 300, "\U0001f600" * 300])
def test_a_text_needs_room_for_one_frame_and_its_end(text):
    length = len(text.encode()) + len("[0]") + 2
    assert begin(Request(text), length + 2)[0].next_utterance().max_frames == 1
    message = f"^the text takes {length} positions of {length + 1}, which leaves no room for its"
    with pytest.raises(InputError, match=message) as error:
        begin(Request(text), length + 1)
    assert "\n" not in str(error.value)


def test_the_window_is_at_most_the_models():
    state, _ = begin(Request("Hi.", max_audio_length_ms=10**9, guard="off"), max_seq_len=10**6)
    assert state.next_utterance().max_frames == CONFIG.backbone.max_seq_len - 1 - 8


@given(st.lists(st.integers(8, 90), max_size=20), st.integers(60, 300))
def test_the_newest_turns_that_fit_are_kept(lengths, window):
    """They leave room for the text, its speech and its end."""
    kept = len(lengths)
    while kept and window - 1 - 8 - sum(lengths[-kept:]) < frames_for("Hi.") // 2:
        kept -= 1
    state, notices = begin(Request("Hi.", 0, context(*lengths)), max_seq_len=window)
    assert state.num_turns == kept
    dropped = len(lengths) - kept
    expected = [f"the oldest {dropped} of {len(lengths)} turns"] * bool(dropped)
    assert [" ".join(notice.message.split()[:6]) for notice in notices] == expected


def test_rows_are_only_made_of_turns_that_can_fit(monkeypatch):
    """However many there are; those that are left out are checked and counted too."""
    made = []

    def note(turn, *more):
        made.append(turn)
        return Turn(turn, *more)

    monkeypatch.setattr(request_state, "Turn", note)
    turns = [Segment(i, "\U0001f600" * 10_000) for i in range(64)]
    state, notices = begin(Request("Hi.", 0, turns))
    assert state.num_turns == 0
    assert [turn.speaker for turn in made] == [63]
    assert notices[0].message.startswith("the oldest 64 of 64 turns of context were left out")
    for wrong in (Segment(0, " "), Segment(0, "\ud800"), Segment(0, "a", codes=NO_CODES[:, :2])):
        with pytest.raises(InputError):
            begin(Request("Hi.", 0, [wrong, *turns]))


# --- Recordings ----------------------------------------------------------------------------------


def recorded(frames: np.ndarray) -> np.ndarray:
    """A recording whose length is not a whole number of frames."""
    count = len(frames) * CONFIG.codec.frame_size - 7
    return np.resize([0.1, -0.1], count).astype(np.float32) + np.float32(frames.sum() / 1e6)


@pytest.mark.parametrize("num_turns", [1, 7, 8, 30])
def test_only_turns_that_fit_are_encoded(num_turns):
    """Prompt and notices are those of a context that was encoded before."""
    generated = [codes(250, i) for i in range(num_turns)]
    known = [Segment(i % 2, "a", codes=frames) for i, frames in enumerate(generated)]
    wanted, expected_notices = begin(Request("Hi.", 0, known))
    encoded = []

    def encode(audio):
        encoded.append(audio)
        return next(frames for frames in generated if np.array_equal(recorded(frames), audio))

    recordings = [Segment(i % 2, "a", recorded(frames)) for i, frames in enumerate(generated)]
    notices = []
    request = Request("Hi.", 0, recordings)
    state = RequestState(StubModel(encode), request, notices.append)
    assert state.num_turns == min(num_turns, 7)  # recordings of 250 frames in 2048 positions
    for got, expected in zip(
        state.next_utterance().prompt, wanted.next_utterance().prompt, strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    assert notices == expected_notices
    assert len(encoded) == min(num_turns, 7)


def test_an_error_of_the_codec_stops_encoding():
    def encode(audio):
        encoded.append(audio)
        if len(encoded) == 2:
            raise RequestCancelledError("the request was cancelled")
        return codes(3)

    encoded, notices = [], []
    request = Request("Hi.", 0, [Segment(0, "a", recorded(codes(3)))] * 5)
    state = RequestState(StubModel(encode), request, notices.append)
    assert not encoded
    with pytest.raises(RequestCancelledError):
        state.next_utterance()
    assert len(encoded) == 2
