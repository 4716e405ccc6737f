"""The runaway guard: faults that stop speech, and natural speech that is no fault."""

import dataclasses
import itertools

import numpy as np
import pytest

from csm_jax.errors import InputError
from csm_jax.inference.guard import REPEATS, SILENT, TOO_LONG, Action, Guard, GuardLimits

LIMITS = GuardLimits()
ENDLESS = 10**6
SILENCE = (3, 1, 4)
VOCAB = 2048
SECOND = 12.5  # frames


def speech(num_frames: int, seed: int = 0, codebooks: int = 7, vocab: int = VOCAB) -> np.ndarray:
    """Random codes [num_frames, Q] without those of silence."""
    rng = np.random.default_rng([seed, num_frames])
    return rng.integers(10, vocab, (num_frames, codebooks), np.int32)


def silence(num_frames: int, seed: int = 0, codebooks: int = 7) -> np.ndarray:
    """Random codes but for codebook 0."""
    frames = speech(num_frames, seed, codebooks)
    frames[:, 0] = np.random.default_rng(seed).choice(SILENCE, num_frames)
    return frames


def loop(period: int, num_frames: int, seed: int = 0, codebooks: int = 7) -> np.ndarray:
    return np.resize(speech(period, seed + 99, codebooks), (num_frames, codebooks))


def join(*frames: np.ndarray) -> np.ndarray:
    return np.concatenate(frames)


def play(drafts, chunks, limits=LIMITS, max_frames=ENDLESS):
    """The frames that are released, and the events, if the guard is obeyed.

    Args:
      drafts: whole utterances; the first is generated first, and after a fault the next from where
        the guard goes back to, or the last once more.
      chunks: sizes of the chunks in turn, repeated.

    Returns:
      Released frames [n, Q]; per event (action, reason, kept).
    """
    codebooks = drafts[0].shape[1]
    guard = Guard(max_frames, codebooks, SILENCE, limits)
    released, events, position = [np.zeros((0, codebooks), np.int32)], [], 0
    for size in itertools.cycle(chunks):
        frames = drafts[min(len(events), len(drafts) - 1)]
        if position >= len(frames):
            break
        verdict = guard.accept(frames[position : position + size])
        released.append(verdict.released)
        assert verdict.kept == sum(map(len, released))
        position += size
        if verdict.action is not Action.CONTINUE:
            events.append(verdict[1:])
            position = verdict.kept
        if verdict.action is Action.CUT:
            return np.concatenate(released), events
    released.append(guard.finish())
    return np.concatenate(released), events


def fires(frames: np.ndarray, **kwargs) -> tuple[int, int, str] | None:
    """The frame at which the guard fires first, how many frames it keeps, and the reason."""
    guard = Guard(kwargs.pop("max_frames", ENDLESS), frames.shape[1], SILENCE, **kwargs)
    for i in range(len(frames)):
        verdict = guard.accept(frames[i : i + 1])
        if verdict.action is not Action.CONTINUE:
            return i, verdict.kept, verdict.reason
    return None


def assert_undisturbed(frames: np.ndarray) -> None:
    released, events = play([frames], [1])
    assert events == []
    np.testing.assert_array_equal(released, frames)


# --- When it fires ------------------------------------------------------------------------------


@pytest.mark.parametrize("codebooks", [1, 2, 7, 32])
@pytest.mark.parametrize("start", [0, 1, 40])
def test_a_repeated_frame_is_a_fault_after_one_second(codebooks, start):
    """The frame itself, 12 repetitions, of which 3 are released."""
    frames = join(speech(start, 1, codebooks), loop(1, 50, 2, codebooks))
    assert fires(frames) == (start + 12, start + 1 + 3, REPEATS)
    assert_undisturbed(frames[: start + 12])


@pytest.mark.parametrize("period", range(2, 26))
def test_a_loop_is_a_fault_after_two_seconds_or_two_periods(period):
    """The period is followed by 2 s or two periods of repetition."""
    needed = max(25, 2 * period)
    frames = join(speech(30, 1), loop(period, 100, 2))
    assert fires(frames) == (30 + period + needed - 1, 30 + period + 3, REPEATS)
    assert_undisturbed(frames[: 30 + period + needed - 1])


def test_a_period_beyond_the_longest_is_no_loop():
    assert_undisturbed(loop(26, 300))


def test_silence_after_speech_is_a_fault():
    frames = join(speech(20), silence(60))
    assert fires(frames) == (20 + 30, 20 + 10, SILENT)
    assert_undisturbed(frames[: 20 + 30])


def test_silence_before_speech_may_be_longer():
    assert fires(silence(60)) == (49, 10, SILENT)
    assert_undisturbed(join(silence(49), speech(50)))


def test_a_click_does_not_end_the_first_silence():
    """One frame does not, two do."""
    click = join(silence(5), speech(1), silence(60))
    # One frame is added for the click, one subtracted for it.
    assert fires(click) == (5 + 1 + 45, 5 + 1 + 6, SILENT)
    word = join(silence(5), speech(2), silence(60))
    assert fires(word) == (5 + 2 + 30, 5 + 2 + 10, SILENT)


def test_repeated_frames_of_silence_count_as_silence():
    """Digital silence has equal frames; 2.4 s of it are a pause, not a loop."""
    still = np.tile(silence(1), (60, 1))
    assert_undisturbed(join(speech(20), still[:30], speech(20)))
    assert fires(join(speech(20), still)) == (20 + 30, 20 + 10, SILENT)


def test_pauses_in_a_loop_do_not_count():
    """Of each 10 frames 7 count, until there are 25."""
    frames = join(*(join(speech(7), silence(3, i)) for i in range(10)))
    assert fires(frames) == (10 + 3 * 10 + 4 - 1, 10 + 3, REPEATS)


@pytest.mark.parametrize(("strange", "at"), [(36, 45), (30, 50)])
def test_a_strange_frame_beside_a_pause_counts_once(strange, at):
    frames = join(*(join(speech(7), silence(3, i)) for i in range(10)))
    frames[strange] = speech(1, 5)
    assert fires(frames) == (at, 10 + 3, REPEATS)


def test_a_word_repeated_with_exact_pauses_is_a_fault():
    frames = join(speech(20), np.tile(join(speech(6), np.tile(silence(1), (12, 1))), (20, 1)))
    at, _, reason = fires(frames)
    assert reason == REPEATS
    assert at < 20 + 10 * SECOND


@pytest.mark.parametrize("codebook", range(1, 7))
@pytest.mark.parametrize("period", [1, 5])
def test_a_loop_in_which_one_codebook_varies_is_a_fault(codebook, period):
    frames = join(speech(30), loop(period, 60))
    expected = fires(frames)
    assert expected[2] == REPEATS
    frames[:, codebook] = speech(90, 7)[:, codebook]
    assert fires(frames) == expected


def test_at_full_size_the_fine_codebooks_may_vary():
    frames = loop(1, 40, codebooks=32)
    frames[:, 8:] = speech(40, 5, codebooks=32)[:, 8:]
    assert fires(frames) == (12, 4, REPEATS)
    frames[:, 6:8] = speech(40, 5, codebooks=32)[:, 6:8]
    assert fires(frames) == (12, 4, REPEATS)
    frames[:, 5] = speech(40, 5, codebooks=32)[:, 5]  # 5 of 8 are less than 3/4
    assert fires(frames) is None


@pytest.mark.parametrize("period", [2, 4, 9])
def test_one_strange_frame_does_not_end_a_loop_and_two_do(period):
    """It deviates twice, itself and from its repetition, and costs two frames each time."""
    frames = join(speech(20), loop(period, 200))
    at = fires(frames)[0]
    frames[40] = speech(1, 5)
    assert fires(frames)[0] == at + 4
    frames[41] = speech(1, 6)
    assert fires(frames)[0] == 42 + period + 25 - 1


def test_one_strange_frame_does_not_end_a_silence_and_two_do():
    frames = join(speech(20), silence(200))
    at = fires(frames)[0]
    frames[40] = speech(1, 5)
    assert fires(frames)[0] == at + 2
    frames[41] = speech(1, 6)
    assert fires(frames)[0] == 42 + 31 - 1


@pytest.mark.parametrize("chunk", [1, 7, 25])
def test_speech_longer_than_its_text_is_cut(chunk):
    frames = speech(100)
    released, events = play([frames], [chunk], max_frames=60)
    assert events == [(Action.CUT, TOO_LONG, 60)]
    np.testing.assert_array_equal(released, frames[:60])
    released, events = play([frames[:60]], [chunk], max_frames=60)
    assert events == []
    assert len(released) == 60


def test_a_pause_at_the_length_limit_is_dropped():
    _, events = play([join(speech(40), silence(25))], [1], max_frames=60)
    assert events == [(Action.CUT, TOO_LONG, 50)]


# --- When it does not ---------------------------------------------------------------------------


@pytest.mark.parametrize("codebooks", [7, 32])
@pytest.mark.parametrize("seed", range(20))
def test_random_speech_has_no_fault(seed, codebooks):
    frames = speech(400, seed, codebooks)
    verdict = Guard(ENDLESS, codebooks, SILENCE).accept(frames)
    assert (verdict.action, verdict.reason, verdict.kept) == (Action.CONTINUE, "", 400)
    np.testing.assert_array_equal(verdict.released, frames)


@pytest.mark.parametrize("seed", range(20))
def test_few_sounds_and_pauses_up_to_two_seconds_are_no_fault(seed):
    """Codebook 0 has twenty codes, like a sentence of one voice."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(10):
        words = speech(int(rng.integers(2, 40)), int(rng.integers(1000)))
        words[:, 0] = rng.integers(10, 30, len(words))
        parts += [words, silence(int(rng.integers(1, 26)), seed)]
    assert_undisturbed(join(*parts))


@pytest.mark.parametrize("vowel_frames", [10, 100])
@pytest.mark.parametrize("constant", [1, 3, 5])
def test_a_held_vowel_is_no_fault(vowel_frames, constant):
    """The semantic code and some coarse acoustic codes are constant; the others vary."""
    frames = speech(20 + vowel_frames + 20, 3, 32)
    frames[20 : 20 + vowel_frames, :constant] = frames[20, :constant]
    assert_undisturbed(frames)


def test_laughter_is_no_fault():
    """In "ha ha ha", codebook 0 has a period of 3 for 4 s; the acoustic codes have none."""
    frames = speech(50, 4)
    frames[:, 0] = np.resize([100, 200, 300], 50)
    frames[:, 1] = np.resize([11, 12, 13], 50)
    assert_undisturbed(join(speech(10), frames, speech(10)))


def test_a_stutter_is_no_fault():
    """Even exact repetition is no fault while it is short: four times 4 frames."""
    assert_undisturbed(join(speech(10), loop(4, 16), speech(10)))


# --- Holding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "held_from"),
    [(silence(25), 10), (loop(1, 12), 1 + 3), (loop(6, 20), 6 + 3)],
    ids=["silence", "repeated", "loop"],
)
def test_a_run_is_held_and_released_when_it_ends(run, held_from):
    frames = join(speech(20), run, speech(20, 8))
    guard = Guard(ENDLESS, 7, SILENCE)
    kept = [guard.accept(frames[i : i + 1]).kept for i in range(len(frames))]
    onset, end = 20 + held_from, 20 + len(run)
    assert kept[:onset] == list(range(1, onset + 1))
    assert kept[onset : end + 1] == [onset] * (end + 1 - onset)  # one frame does not end the run
    assert kept[end + 1 :] == list(range(end + 2, len(frames) + 1))
    assert len(guard.finish()) == 0


def test_ordinary_pauses_are_not_delayed():
    guard = Guard(ENDLESS, 7, SILENCE)
    for i, frame in enumerate(join(speech(20), silence(10), speech(20))):
        np.testing.assert_array_equal(guard.accept(frame[None]).released, [frame])
        assert i < 50


def test_finish_releases_withheld_frames():
    frames = join(speech(20), silence(25))
    guard = Guard(ENDLESS, 7, SILENCE)
    assert len(guard.accept(frames).released) == 30
    np.testing.assert_array_equal(guard.finish(), frames[30:])
    assert guard.finish().shape == (0, 7)


def test_finish_before_any_frame_releases_nothing():
    released = Guard(ENDLESS, 7, SILENCE).finish()
    assert (released.shape, released.dtype) == ((0, 7), np.int32)


def test_dropped_frames_are_not_released_later():
    guard = Guard(ENDLESS, 7, SILENCE)
    verdict = guard.accept(join(speech(20), silence(60)))
    assert (verdict.action, len(verdict.released)) == (Action.RESAMPLE, 30)
    assert len(guard.finish()) == 0


def test_the_guard_copies_what_it_holds():
    frames = join(speech(20), silence(25))
    guard, buffer = Guard(ENDLESS, 7, SILENCE), frames.copy()
    released = guard.accept(buffer).released
    buffer[:] = 0
    np.testing.assert_array_equal(join(released, guard.finish()), frames)


# --- Trying again -------------------------------------------------------------------------------


def test_a_draft_without_a_fault_is_released():
    runaway = join(speech(20), silence(100))
    better = join(runaway[:30], speech(40, 9))
    released, events = play([runaway, better], [25])
    assert events == [(Action.RESAMPLE, SILENT, 30)]
    np.testing.assert_array_equal(released, better)


def test_the_last_draft_is_cut_at_its_fault():
    """The silence continues in every draft, and is counted from its start and not from the cut."""
    runaway = join(speech(20), silence(100))
    guard = Guard(ENDLESS, 7, SILENCE)
    assert guard.accept(runaway[:51])[1:] == (Action.RESAMPLE, SILENT, 30)
    assert guard.accept(runaway[30:50])[1:] == (Action.CONTINUE, "", 30)
    assert guard.accept(runaway[50:51])[1:] == (Action.RESAMPLE, SILENT, 30)
    assert guard.accept(runaway[30:51])[1:] == (Action.CUT, SILENT, 30)


@pytest.mark.parametrize("retries", [0, 1, 5])
def test_max_retries_is_the_number_of_drafts(retries):
    runaway = join(speech(20), loop(1, 30))
    limits = dataclasses.replace(LIMITS, max_retries=retries)
    released, events = play([runaway], [4], limits)
    assert events == [(Action.RESAMPLE, REPEATS, 24)] * retries + [(Action.CUT, REPEATS, 24)]
    np.testing.assert_array_equal(released, runaway[:24])


def test_retries_are_counted_for_the_whole_utterance():
    """Different faults at different frames share the limit."""
    first = join(speech(20), silence(60))
    second = join(first[:30], speech(20, 2), loop(3, 60))
    third = join(second[: 50 + 3 + 3], speech(20, 3), loop(1, 60, 4))
    released, events = play([first, second, third], [3])
    assert events == [
        (Action.RESAMPLE, SILENT, 30),
        (Action.RESAMPLE, REPEATS, 56),
        (Action.CUT, REPEATS, 80),
    ]
    np.testing.assert_array_equal(released, third[:80])


def test_dropped_frames_do_not_count_towards_the_length():
    runaway = join(speech(20), silence(60))
    better = join(runaway[:30], speech(40, 9))
    released, events = play([runaway, better], [1], max_frames=65)
    assert events == [(Action.RESAMPLE, SILENT, 30), (Action.CUT, TOO_LONG, 65)]
    assert len(released) == 65


# --- Chunks -------------------------------------------------------------------------------------


def eventful(rng: np.random.Generator, kept: np.ndarray) -> np.ndarray:
    """An utterance of complete and incomplete runs of all kinds, which begins with `kept`."""
    parts = [kept]
    for _ in range(rng.integers(1, 12)):
        seed, length = int(rng.integers(10**6)), int(rng.integers(1, 45))
        kind = rng.choice(["speech", "few sounds", "silence", "repeated", "loop"])
        parts.append(
            {
                "speech": speech(length, seed),
                "few sounds": speech(length, seed, vocab=13),
                "silence": silence(length, seed),
                "repeated": loop(1, length // 3 + 1, seed),
                "loop": loop(int(rng.integers(2, 10)), length, seed),
            }[kind]
        )
    return join(*parts)


def drafts_of(rng: np.random.Generator) -> list[np.ndarray]:
    """Drafts that agree as far as the guard keeps them, like generation from one state."""
    drafts = [eventful(rng, speech(0))]
    for _ in range(2):
        events = play(drafts, [1])[1]
        if len(events) < len(drafts):
            break
        drafts.append(eventful(rng, drafts[-1][: events[len(drafts) - 1][2]]))
    return drafts


def test_the_outcome_does_not_depend_on_the_chunks():
    outcomes = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        drafts, max_frames = drafts_of(rng), int(rng.choice([150, ENDLESS]))
        released, events = play(drafts, [1], max_frames=max_frames)
        chunkings = [[25], [5], [ENDLESS], [1, 24], *rng.integers(1, 40, (4, 50)).tolist()]
        for chunks in chunkings:
            again, same_events = play(drafts, chunks, max_frames=max_frames)
            np.testing.assert_array_equal(again, released)
            assert same_events == events
        outcomes |= {event[:2] for event in events} | {len(events)}
    # The drafts contain all kinds of events.
    resampled = {(Action.RESAMPLE, SILENT), (Action.RESAMPLE, REPEATS)}
    cut = {(Action.CUT, SILENT), (Action.CUT, REPEATS), (Action.CUT, TOO_LONG)}
    assert outcomes == resampled | cut | {0, 1, 2, 3}


def test_released_frames_are_never_taken_back():
    """What is released grows with every draft, and is a prefix of the current one."""
    for seed in range(60, 90):
        drafts = drafts_of(np.random.default_rng(seed))
        released, events = play(drafts, [25])
        standing = drafts[min(len(events), len(drafts) - 1)]
        np.testing.assert_array_equal(released, standing[: len(released)])


# --- Limits -------------------------------------------------------------------------------------


def test_limits_can_be_set():
    limits = GuardLimits(
        repeated_frames=5,
        loop_frames=8,
        loop_repeats=3,
        longest_period=4,
        silent_frames=6,
        first_silent_frames=7,
        repeats_before_holding=1,
        silence_before_holding=2,
    )
    start = speech(9)
    assert fires(join(start, loop(1, 30)), limits=limits) == (9 + 5, 9 + 2, REPEATS)
    assert fires(join(start, loop(2, 30)), limits=limits) == (9 + 2 + 7, 9 + 3, REPEATS)
    assert fires(join(start, loop(4, 30)), limits=limits) == (9 + 4 + 11, 9 + 5, REPEATS)
    assert fires(join(start, loop(5, 60)), limits=limits) is None
    assert fires(join(start, silence(30)), limits=limits) == (9 + 5, 9 + 2, SILENT)
    assert fires(silence(30), limits=limits) == (6, 2, SILENT)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(GuardLimits)])
def test_limits_must_be_counts(name):
    least = 0 if name == "max_retries" else 1
    for value in (least - 1, 1.5, float("nan")):
        message = rf"^{name} is {value}, but must be a whole number of at least {least}$"
        with pytest.raises(InputError, match=message):
            GuardLimits(**{name: value})
