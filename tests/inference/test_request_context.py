"""Which turns of the context are in a prompt, and which recordings are encoded."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures import TOKENIZER
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
from csm_jax.inference.config import DEFAULT_INFERENCE
from csm_jax.inference.request_state import RequestState
from csm_jax.prompt.splitting import split_text


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
        assert notices[0].message.startswith("1 of 3 turns of context were left out")
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
            numbers = ["1 to 3", "1 to 2", "1"][kept]
            assert notices[0].message.startswith(f"{numbers} of 3 turns of context were")


WINDOW = CONFIG.backbone.max_seq_len
# Eight parts that take 206 positions each, of which 90 frames are spoken: 7.2 s.
TEXT = " ".join(letter * 200 + "." for letter in "abcdefgh")
PARTS = split_text(TEXT)
SPOKEN = [codes(90, i) for i in range(len(PARTS))]


def play_parts(context: list[Segment] = (), window: int | None = None, **options):
    """Plays `TEXT` after a context; returns the utterances and the notices."""
    state, notices = begin(Request(TEXT, 0, context, guard="off", **options), max_seq_len=window)
    utterances, _, _ = play(state, *([join(part, END)] for part in SPOKEN))
    assert len(utterances) == len(PARTS) == 8
    for utterance in utterances:
        assert utterance.max_length < (window or WINDOW)
    return utterances, notices


def assert_parts(utterance, index: int, *turns: Segment, kept: list[int]) -> None:
    """Checks that the prompt of a part is some turns, and the kept parts before it."""
    parts = [Segment(0, PARTS[i], codes=SPOKEN[i]) for i in kept]
    assert_prompt(utterance, *turns, *parts, text=PARTS[index])


@pytest.mark.parametrize(
    ("seconds", "newest"), [(28.8, 4), (21.6, 3), (14.4, 2), (14.3, 2), (7.2, 1), (7, 1), (0, 0)]
)
@pytest.mark.parametrize("is_the_models", [False, True])
def test_a_part_has_what_fixes_the_voice_and_the_last_seconds_as_its_context(
    monkeypatch, is_the_models, seconds, newest
):
    """Without a prompt, the first part fixes the voice."""
    inference = dataclasses.replace(DEFAULT_INFERENCE, context_seconds=seconds)
    monkeypatch.setattr(StubModel, "inference", inference if is_the_models else DEFAULT_INFERENCE)
    utterances, notices = play_parts(context_seconds=None if is_the_models else seconds)
    for index, utterance in enumerate(utterances):
        last = range(max(0, index - newest), index)
        assert_parts(utterance, index, kept=sorted({*last, *range(min(index, 1))}))
    assert kinds(notices) == []


def test_the_prompt_of_a_voice_stays_and_other_turns_go():
    prompt, question = Segment(0, "hm", codes=codes(90)), Segment(1, "hm", codes=codes(50))
    before = Segment(0, "hm", codes=codes(60, 1))
    utterances, notices = play_parts([prompt, question, before], context_seconds=10)
    assert_parts(utterances[0], 0, prompt, question, before, kept=[])
    assert_parts(utterances[1], 1, prompt, question, before, kept=[0])
    for index in range(2, 8):
        assert_parts(utterances[index], index, prompt, question, kept=[index - 2, index - 1])
    assert kinds(notices) == []


def test_pinned_and_shared_turns_stay():
    turns = [Segment(0, "hm", codes=codes(20, i)) for i in range(4)]
    turns[2] = dataclasses.replace(turns[2], pinned=True)
    utterances, _ = play_parts(turns, context_seconds=0)
    for index in range(1, 8):
        assert_parts(utterances[index], index, turns[2], kept=[])
    utterances, _ = play_parts(turns[:2], context_seconds=0, shared_turns=1)
    for utterance in utterances:
        assert utterance.num_shared == 8 + 20
    for index in range(1, 8):
        assert_parts(utterances[index], index, turns[0], kept=[])


def test_all_that_fits_is_kept_on_request():
    utterances, notices = play_parts(context_seconds=np.inf)
    kept = (WINDOW - 1 - 206 - frames_for(PARTS[7]) // 2) // (206 + 91)
    assert 2 < kept < 7
    assert_parts(utterances[7], 7, kept=[0, *range(8 - kept, 7)])
    assert kinds(notices) == []


def test_a_pinned_turn_is_left_out_if_it_does_not_fit_by_itself():
    """With a notice that names it; then the first part fixes the voice."""
    prompt = Segment(0, "hm", codes=codes(100))
    room = 206 + 1 + frames_for(PARTS[0]) // 2
    utterances, notices = play_parts([prompt], room + 297, shared_turns=1, context_seconds=0)
    assert_parts(utterances[0], 0, prompt, kept=[])
    assert [utterance.num_shared for utterance in utterances] == [8 + 100] * 8
    utterances, notices = play_parts([prompt], room + 107, shared_turns=1, context_seconds=0)
    assert [utterance.num_shared for utterance in utterances] == [0] * 8
    assert [notice.message[:38] for notice in notices] == ["1 of 1 turns of context were left out:"]
    utterances, notices = play_parts([Segment(0, "hm", codes=codes(400))], room + 297)
    assert_parts(utterances[7], 7, kept=[0])
    assert kinds(notices) == ["context_dropped"]


def test_the_notice_names_the_turns():
    turns = [Segment(int(i in (0, 4)), "hm", codes=codes(92, i)) for i in range(7)]
    request = Request("Hi.", 1, turns, max_audio_length_ms=10 * FRAME_MS, context_seconds=10)
    state, notices = begin(request, max_seq_len=8 + 1 + 10 + 4 * 101)
    assert state.kept_turns == [0, 1, 5, 6]
    assert notices[0].message.startswith("3 to 5 of 7 turns of context were left out: ")


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


@given(st.lists(st.integers(8, 90), max_size=20), st.integers(60, 2000))
def test_all_turns_are_kept_if_they_fit(lengths, window):
    """They leave room for the text, its speech and its end."""
    turns = context(*lengths)
    state, notices = begin(Request("Hi.", 0, turns, context_seconds=0), max_seq_len=window)
    if window - 1 - 8 - sum(lengths) >= frames_for("Hi.") // 2:
        assert_prompt(state.next_utterance(), *turns, text="Hi.")
        assert kinds(notices) == []
    else:
        assert len(state.kept_turns) <= 1
        assert kinds(notices) == ["context_dropped"]


def test_texts_are_only_tokenized_of_turns_that_can_fit(monkeypatch):
    """However many there are; those that are left out are checked and counted too."""
    texts = []

    def encode(text):
        texts.append(text[:4])
        return TOKENIZER.encode(text)

    monkeypatch.setattr(StubModel, "tokenizer", SimpleNamespace(encode=encode))
    turns = [Segment(i, "\U0001f600" * 10_000) for i in range(64)]
    state, notices = begin(Request("Hi.", 0, turns))
    assert state.kept_turns == []
    assert texts == ["[0]H", "[63]"]
    assert notices[0].message.startswith("1 to 64 of 64 turns of context were left out")
    for wrong in (Segment(0, " "), Segment(0, "\ud800"), Segment(0, "a", codes=NO_CODES[:, :2])):
        with pytest.raises(InputError):
            begin(Request("Hi.", 0, [wrong, *turns]))


# --- Recordings ----------------------------------------------------------------------------------


def recorded(frames: np.ndarray) -> np.ndarray:
    """A recording whose length is not a whole number of frames."""
    count = len(frames) * CONFIG.codec.frame_size - 7
    return np.resize([0.1, -0.1], count).astype(np.float32) + np.float32(frames.sum() / 1e6)


@pytest.mark.parametrize(("num_turns", "kept"), [(1, 1), (7, 7), (8, 4), (30, 4)])
def test_only_turns_that_fit_are_encoded(num_turns, kept):
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
    # Seven recordings of 250 frames fit; of more, the first two, and the last two with 40 s.
    assert len(state.kept_turns) == kept
    for got, expected in zip(
        state.next_utterance().prompt, wanted.next_utterance().prompt, strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    assert notices == expected_notices
    assert len(encoded) == kept


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
