"""A request's course, driven by hand with made-up codes: no model is needed."""

import dataclasses

import numpy as np
import pytest
from fixtures import CONFIG as TINY
from fixtures import TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from csm_jax import InputError, Request, Sampling, Segment, request_state
from csm_jax.decode_batch import Utterance
from csm_jax.errors import RequestCancelledError
from csm_jax.prompt import Turn, join_rows, text_rows, turn_rows
from csm_jax.request_state import RequestState
from csm_jax.text import needed_seconds, split_text

# The window of the released model.
BACKBONE = dataclasses.replace(TINY.backbone, max_seq_len=2048)
CONFIG = dataclasses.replace(TINY, backbone=BACKBONE)
Q, FRAME_MS = CONFIG.num_codebooks, CONFIG.frame_ms
SILENCE = frozenset({3, 4, 5})
GREEDY = Sampling(greedy=True)
END = np.zeros((1, Q), np.int32)
# Three parts of 200 letters and a full stop.
LONG = " ".join(letter * 200 + "." for letter in "abc")
NO_CODES = np.zeros((0, Q), np.int32)


def codes(num_frames: int, seed: int = 0) -> np.ndarray:
    """RequestState without a fault: [num_frames, Q], not silent, and never twice the same."""
    return np.random.default_rng([seed, num_frames]).integers(10, 32, (num_frames, Q), np.int32)


def loop(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.repeat(codes(1, seed + 50), num_frames, axis=0)


def join(*frames: np.ndarray) -> np.ndarray:
    return np.concatenate(frames)


def begin(request: Request, max_seq_len: int | None = None) -> tuple[RequestState, list]:
    notices = []
    no_codec = None  # context comes as codes
    arguments = CONFIG, TOKENIZER, no_codec, lambda: SILENCE, notices.append
    return RequestState(request, *arguments, max_seq_len), notices


def play(speech: RequestState, *parts, chunks=(25,)):
    """Lets a model speak that says what is written.

    Args:
      parts: of every utterance its drafts; the first is said first, and after a rewind the next,
        from there on. Like a `Batch`, it says no more than `max_frames`.
      chunks: how many frames at a time, in turn.

    Returns:
      The utterances, and lists of what was released and of the rewinds of each.
    """
    utterances, released, rewinds, turn = [], [], [], 0
    while (utterance := speech.next_utterance()) is not None:
        drafts = list(parts[len(utterances)])
        utterances.append(utterance)
        released.append(NO_CODES)
        rewinds.append([])
        draft, position, is_over = drafts.pop(0), 0, False
        while not is_over:
            size = chunks[turn % len(chunks)]
            turn += 1
            frames = draft[: utterance.max_frames][position : position + size]
            assert len(frames) > 0, "it waits for frames that cannot come"
            step = speech.accept(frames)
            released[-1] = join(released[-1], step.released)
            position, is_over = position + size, step.is_over
            if step.rewind is not None:
                rewinds[-1].append(step.rewind)
                position, draft = len(step.rewind.codes), drafts.pop(0)
                np.testing.assert_array_equal(step.rewind.codes, released[-1])
    return utterances, released, rewinds


def kinds(notices) -> list[str]:
    assert all("\n" not in notice.message for notice in notices)
    return [notice.kind for notice in notices]


def frames_for(text: str) -> int:
    return int(1000 * needed_seconds(text) / FRAME_MS)


def assert_prompt(utterance: Utterance, *turns: Segment, text: str, speaker: int = 0) -> None:
    spoken = [rows for turn in turns for rows in turn_rows(turn, CONFIG, TOKENIZER)]
    expected = join_rows([*spoken, text_rows(text, speaker, CONFIG, TOKENIZER)])
    for got, wanted in zip(utterance.prompt, expected, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


# --- Parts --------------------------------------------------------------------------------------


def test_every_part_is_context_of_the_next():
    """After the conversation so far, in the same voice, as it was said up to its end."""
    before = Segment(7, "before", codes=codes(9))
    speech, notices = begin(Request(LONG, 4, [before], seed=5))
    said = [codes(30, 1), codes(40, 2), codes(50, 3)]
    utterances, released, _ = play(speech, *([join(part, END)] for part in said))
    parts = split_text(LONG)
    assert len(parts) == 3
    turns = [Segment(4, text, codes=part) for text, part in zip(parts, said, strict=True)]
    for index, utterance in enumerate(utterances):
        assert_prompt(utterance, before, *turns[:index], text=parts[index], speaker=4)
        np.testing.assert_array_equal(released[index], said[index])
    assert kinds(notices) == []


def test_what_follows_the_end_is_ignored():
    """A batch runs on beside a row that has ended."""
    speech, _ = begin(Request("Hi."))
    speech.next_utterance()
    step = speech.accept(join(codes(5), END, codes(3, 1), END))
    np.testing.assert_array_equal(step.released, codes(5))
    assert step[1:] == (None, True)


@pytest.mark.parametrize("guard", ["on", "off"])
def test_what_is_beyond_the_limit_is_ignored(guard):
    speech, _ = begin(Request("Hi.", max_audio_length_ms=20 * FRAME_MS, guard=guard))
    speech.next_utterance()
    np.testing.assert_array_equal(speech.accept(codes(40)[:15]).released, codes(40)[:15])
    step = speech.accept(codes(40)[15:])
    np.testing.assert_array_equal(step.released, codes(40)[15:20])
    assert step[1:] == (None, True)


def test_seeds():
    def seeds(seed: int) -> list[int]:
        utterances, _, rewinds = play(
            begin(Request(LONG, seed=seed))[0],
            [join(codes(8), loop(40)), join(codes(11), loop(40, 1)), join(codes(20), END)],
            [join(codes(8), END)],
            [join(codes(8), END)],
        )
        assert utterances[0].seed == seed  # so that a short text is what it would be anyway
        return [u.seed for u in utterances] + [r.seed for part in rewinds for r in part]

    assert len(set(seeds(5))) == 5
    assert seeds(5) == seeds(5)
    assert not set(seeds(5)) & set(seeds(6))
    for seed in (-1, 2**70):
        assert len(set(seeds(seed))) == 5


# --- Room ---------------------------------------------------------------------------------------


def context(*lengths: int) -> list[Segment]:
    """Turns that take so many positions: 8 at least."""
    return [Segment(1, "hm", codes=codes(n - 8, i)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("spare", [0, 1, -1])
@pytest.mark.parametrize("max_audio_length_ms", [None, 10 * FRAME_MS])
def test_the_oldest_turns_make_room_for_half_of_what_the_text_can_need(max_audio_length_ms, spare):
    """Or for all that is asked for, if that is less."""
    turns = context(40, 20, 30)
    room = min(frames_for("Hi.") // 2, 10 if max_audio_length_ms else 125)
    text = 8  # BOS, "[0]Hi.", EOS
    request = Request("Hi.", 0, turns, max_audio_length_ms=max_audio_length_ms)
    speech, notices = begin(request, max_seq_len=90 + text + room + 1 + spare)
    utterance = speech.next_utterance()
    kept = turns if spare >= 0 else turns[1:]
    assert_prompt(utterance, *kept, text="Hi.")
    assert kinds(notices) == ["context_dropped"] * (spare < 0)
    if spare < 0:
        assert notices[0].message.startswith("the oldest 1 of 3 turns of context were left out")
    assert utterance.max_frames == (
        10 if max_audio_length_ms else room + (40 - 1) * (spare < 0) + max(spare, 0)
    )


def test_as_many_turns_go_as_have_to():
    # 8 for the text, 46 for its speech and one for its end; 20 for every turn.
    for window, kept in ((115, 3), (114, 2), (95, 2), (94, 1), (75, 1), (74, 0), (55, 0)):
        turns = context(20, 20, 20)
        speech, notices = begin(Request("Hi.", 0, turns), max_seq_len=window)
        assert_prompt(speech.next_utterance(), *turns[3 - kept :], text="Hi.")
        assert kinds(notices) == ["context_dropped"] * (kept < 3)
        if kept < 3:
            assert f"the oldest {3 - kept} of 3 turns" in notices[0].message


def test_the_parts_of_a_long_text_are_forgotten_too():
    """Frames are never more than fit, and the last parts are there whole."""
    text = " ".join(letter * 200 + "." for letter in "abcdefgh")
    parts = split_text(text)
    speech, notices = begin(Request(text, guard="off"))
    said = [codes(90, i) for i in range(len(parts))]
    utterances, _, _ = play(speech, *([join(part, END)] for part in said))
    assert len(utterances) == len(parts) == 8
    window = CONFIG.backbone.max_seq_len
    for index, utterance in enumerate(utterances):
        length = len(utterance.prompt[0])
        assert length + utterance.max_frames < window
        assert utterance.max_frames >= frames_for(parts[index]) // 2
        turn = 206 + 91
        kept = (length - 206) // turn
        assert kept == min(index, (window - 1 - 206 - frames_for(parts[index]) // 2) // turn)
        turns = zip(parts[index - kept : index], said[index - kept : index], strict=True)
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


def test_the_window_is_never_more_than_the_models():
    speech, _ = begin(Request("Hi.", max_audio_length_ms=10**9, guard="off"), max_seq_len=10**6)
    assert speech.next_utterance().max_frames == CONFIG.backbone.max_seq_len - 1 - 8


# --- Limits and ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("guard", ["on", "off"])
def test_the_limit_is_for_all_parts_together(guard):
    speech, notices = begin(Request(LONG, max_audio_length_ms=50 * FRAME_MS, guard=guard))
    parts = [join(codes(30), END)], [codes(99, 1)]
    utterances, released, _ = play(speech, *parts)
    assert [utterance.max_frames for utterance in utterances] == [50, 20]
    np.testing.assert_array_equal(join(*released), join(codes(30), codes(99, 1)[:20]))
    assert kinds(notices) == ["cut"]
    assert notices[0].message.startswith("the speech was cut at 4 s and 1 of 3 parts of the text")


@pytest.mark.parametrize(("num_frames", "missing"), [(29, 1), (30, 2)])
def test_parts_that_are_missing(num_frames, missing):
    """The last frame that is allowed is for the next part, if there is one."""
    speech, notices = begin(Request(LONG, max_audio_length_ms=30 * FRAME_MS + 79))
    utterances, _, _ = play(speech, [join(codes(num_frames), END)], [codes(9)])
    assert [utterance.max_frames for utterance in utterances] == [30, 1][: 3 - missing]
    assert kinds(notices) == ["cut"]
    assert f"{missing} of 3 parts of the text are missing" in notices[0].message


@pytest.mark.parametrize("num_frames", [19, 20, 21])
def test_speech_up_to_its_limit(num_frames):
    """The end of speech is a frame of its own: at the limit it is not waited for."""
    speech, notices = begin(Request("Hi.", max_audio_length_ms=20 * FRAME_MS))
    _, (released,), _ = play(speech, [join(codes(num_frames), END)])
    np.testing.assert_array_equal(released, codes(num_frames)[:20])
    assert kinds(notices) == ["cut"] * (num_frames >= 20)
    if notices:
        assert "at 1.6 s and it may lack its end: raise max_audio" in notices[0].message


def test_the_limit_by_itself():
    """10 s, or what a text can need if that is more."""
    long = "x" * 250
    for text, frames in (("Hi.", 125), (long, frames_for(long))):
        utterance = begin(Request(text, guard="off"))[0].next_utterance()
        assert utterance.max_frames == frames


def test_a_part_that_fills_the_window():
    """It lacks its end however the next one ends, and a higher limit would not help."""
    two = " ".join(letter * 200 + "." for letter in "ab")
    speech, notices = begin(Request(two, guard="off"), max_seq_len=206 + 1 + 60)
    _, released, _ = play(speech, [codes(400)], [join(codes(10), END)])
    assert [len(part) for part in released] == [60, 10]
    assert sorted(kinds(notices)) == ["context_dropped", "cut"]
    (cut,) = [notice for notice in notices if notice.kind == "cut"]
    assert "max_audio_length_ms" not in cut.message


@pytest.mark.parametrize("guard", ["on", "off"])
def test_nothing_said(guard):
    speech, notices = begin(Request("Hi.", guard=guard))
    _, (released,), _ = play(speech, [END])
    assert released.shape == (0, Q)
    assert kinds(notices) == ["nothing_said"]
    assert notices[0].message == "the model said nothing for 'Hi.': try another seed"


def test_a_part_that_says_nothing():
    """It is text without sound to the next one, and no reason to worry."""
    speech, notices = begin(Request(LONG))
    utterances, _, _ = play(speech, [END], [join(codes(20), END)], [END])
    first, second, third = split_text(LONG)
    turns = Segment(0, first, codes=NO_CODES), Segment(0, second, codes=codes(20))
    assert_prompt(utterances[2], *turns, text=third)
    assert kinds(notices) == []


# --- The guard ----------------------------------------------------------------------------------

# Drafts of an utterance; what is heard in the end; the frames that are gone back to; notices.
COURSES = {
    "clean": ([join(codes(40), END)], codes(40), [], []),
    "loop": (
        [join(codes(20), loop(40)), join(codes(20), codes(9, 2), END)],
        join(codes(20), loop(4), codes(9, 2)[4:]),
        [24],
        ["resampled"],
    ),
    "three loops": (
        [join(codes(20), loop(40)), join(codes(28), loop(40, 1)), join(codes(36), loop(40, 2))],
        None,
        [24, 32],
        ["resampled", "resampled", "guard_cut"],
    ),
    "end in a loop": ([join(codes(9), loop(12), END)], join(codes(9), loop(12)), [], []),
    "end in suspense after a loop": (
        [join(codes(9), loop(30)), join(codes(13), loop(10, 1), END)],
        None,
        [13],
        ["resampled"],
    ),
    "no end": ([codes(300)], codes(300)[: frames_for("Hi.")], [], ["guard_cut"]),
    "loop at the end of what is allowed": (
        [join(codes(80), loop(40)), codes(300)],
        None,
        [84],
        ["resampled", "guard_cut"],
    ),
    "loop, then silence": (
        [join(codes(9), loop(30)), join(codes(40), np.full((60, Q), 3, np.int32)), codes(200)],
        None,
        [13, 50],
        ["resampled", "resampled", "guard_cut"],
    ),
}


@pytest.mark.parametrize(("drafts", "heard", "gone_back", "told"), COURSES.values(), ids=COURSES)
def test_the_guard_is_obeyed_however_the_frames_come(drafts, heard, gone_back, told):
    """One by one, by hundreds, or anyhow: the same is heard, gone back to, and told."""
    outcomes = []
    for chunks in ([1], [2], [25], [500], [3, 1, 8, 30]):
        speech, notices = begin(Request("Hi.", seed=3))
        (utterance,), (released,), (rewinds,) = play(speech, drafts, chunks=chunks)
        assert utterance.max_frames == frames_for("Hi.") + 1  # one too many is seen, not heard
        outcomes.append((released.tolist(), [rewind.seed for rewind in rewinds], notices))
        assert [len(rewind.codes) for rewind in rewinds] == gone_back
        assert kinds(notices) == told
    for outcome in outcomes[1:]:
        assert outcome == outcomes[0]
    if heard is not None:
        np.testing.assert_array_equal(released, heard)
    # What was heard is a draft up to where it was left, and the next one from there on.
    borders = [0, *gone_back, len(released)]
    for draft, start, end in zip(drafts, borders, borders[1:], strict=False):
        np.testing.assert_array_equal(released[start:end], draft[start:end])


def test_notices_of_the_guard():
    speech, notices = begin(Request("Hi."))
    play(speech, COURSES["three loops"][0])
    assert [notice.message for notice in notices] == [
        "the speech repeats itself at 1.9 s: it went on from there with another seed",
        "the speech repeats itself at 2.6 s: it went on from there with another seed",
        "the speech repeats itself at 3.2 s: it was cut there",
    ]


@pytest.mark.parametrize("name", ["three loops", "loop", "end in a loop"])
def test_a_part_is_context_as_it_was_heard(name):
    """Cut, gone back to, or with frames at its end that were held back to the last."""
    speech, notices = begin(Request(LONG))
    drafts, _, _, told = COURSES[name]
    utterances, released, _ = play(speech, drafts, [join(codes(9), END)], [join(codes(9), END)])
    parts = split_text(LONG)
    assert_prompt(utterances[1], Segment(0, parts[0], codes=released[0]), text=parts[1])
    assert kinds(notices) == told


@pytest.mark.parametrize("left_alone", [{"guard": "off"}, {"sampling": GREEDY}], ids=str)
def test_without_the_guard_all_is_heard(left_alone):
    """And the codes of silence, which take a run of the codec, are not asked for."""
    said = join(codes(5), loop(60), np.full((40, Q), 3, np.int32), codes(15))

    def unasked():
        raise AssertionError

    notices = []
    arguments = CONFIG, TOKENIZER, None, unasked, notices.append
    speech = RequestState(Request("Hi.", **left_alone), *arguments)
    _, (released,), (rewinds,) = play(speech, [join(said, END)], chunks=[7])
    np.testing.assert_array_equal(released, said)
    assert (rewinds, notices) == ([], [])


# --- Requests -----------------------------------------------------------------------------------

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
def test_requests_that_are_refused(values, message):
    with pytest.raises(InputError, match=message) as error:
        begin(Request(**({"text": "Hi."} | values)))
    assert "\n" not in str(error.value)


def test_one_frame_is_the_least():
    assert begin(Request("Hi.", max_audio_length_ms=80))[0].next_utterance().max_frames == 1


# --- Recordings of the context ------------------------------------------------------------------


def recorded(frames: np.ndarray) -> np.ndarray:
    """A stand-in for a recording, of a length that is no whole number of frames."""
    return np.full(len(frames) * CONFIG.codec.frame_size - 7, frames.sum() / 1e6, np.float32)


@pytest.mark.parametrize("num_turns", [1, 7, 8, 30])
def test_only_turns_that_fit_are_encoded(num_turns):
    """The prompt and the notices are those of a context that was encoded before."""
    said = [codes(250, i) for i in range(num_turns)]
    known = [Segment(i % 2, "a", codes=frames) for i, frames in enumerate(said)]
    wanted, told = begin(Request("Hi.", 0, known))
    encoded = []

    def encode(audio):
        encoded.append(audio)
        return next(frames for frames in said if np.array_equal(recorded(frames), audio))

    heard = [Segment(i % 2, "a", recorded(frames)) for i, frames in enumerate(said)]
    notices = []
    request = Request("Hi.", 0, heard)
    speech = RequestState(request, CONFIG, TOKENIZER, encode, lambda: SILENCE, notices.append)
    assert speech.num_turns == min(num_turns, 7)  # of 250 frames in 2048 positions
    for got, expected in zip(
        speech.next_utterance().prompt, wanted.next_utterance().prompt, strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    assert notices == told
    assert len(encoded) == min(num_turns, 7)


def test_encoding_can_be_given_up_between_turns():
    def encode(audio):
        encoded.append(audio)
        if len(encoded) == 2:
            raise RequestCancelledError("the request was cancelled")
        return codes(3)

    encoded, notices = [], []
    request = Request("Hi.", 0, [Segment(0, "a", recorded(codes(3)))] * 5)
    speech = RequestState(request, CONFIG, TOKENIZER, encode, lambda: SILENCE, notices.append)
    assert not encoded
    with pytest.raises(RequestCancelledError):
        speech.next_utterance()
    assert len(encoded) == 2


def test_rows_are_made_of_turns_that_can_fit_only(monkeypatch):
    """However many there are; those that are left out are checked and counted all the same."""
    made = []

    def note(turn, *more):
        made.append(turn)
        return Turn(turn, *more)

    monkeypatch.setattr(request_state, "Turn", note)
    turns = [Segment(i, "\U0001f600" * 10_000) for i in range(64)]
    speech, notices = begin(Request("Hi.", 0, turns))
    assert speech.num_turns == 0
    assert [turn.speaker for turn in made] == [63]
    assert notices[0].message.startswith("the oldest 64 of 64 turns of context were left out")
    for wrong in (Segment(0, " "), Segment(0, "\ud800"), Segment(0, "a", codes=NO_CODES[:, :2])):
        with pytest.raises(InputError):
            begin(Request("Hi.", 0, [wrong, *turns]))


@given(st.lists(st.integers(8, 90), max_size=20), st.integers(60, 300))
def test_the_newest_turns_that_fit_are_kept(lengths, window):
    """As many as leave room for the text, for its speech and for its end."""
    kept = len(lengths)
    while kept and window - 1 - 8 - sum(lengths[-kept:]) < frames_for("Hi.") // 2:
        kept -= 1
    speech, notices = begin(Request("Hi.", 0, context(*lengths)), max_seq_len=window)
    assert speech.num_turns == kept
    dropped = len(lengths) - kept
    expected = [f"the oldest {dropped} of {len(lengths)} turns"] * bool(dropped)
    assert [" ".join(notice.message.split()[:6]) for notice in notices] == expected
