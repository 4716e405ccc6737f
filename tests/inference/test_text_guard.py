"""The guard that knows the text: early ends, and words that are missing, repeated or too many."""

import numpy as np
import pytest

from csm_jax.inference.guard import Guard
from csm_jax.inference.guarded_frames import GuardedFrames
from csm_jax.inference.text_guard import TextGuard, TextGuardLimits

WORDS = ["one", "two", "three", "four"]
SILENT = 7
Q = 3


def frames_of(words, silent=()) -> tuple[np.ndarray, np.ndarray]:
    """Different frames, and the attention to the word of each; None attends to nothing."""
    codes = np.arange(100, 100 + len(words) * Q, dtype=np.int32).reshape(-1, Q)
    codes[list(silent), 0] = SILENT
    mass = np.full((len(words), len(WORDS)), 0.01)
    for frame, word in enumerate(words):
        if word is not None:
            mass[frame, word] = 0.9
    return codes, mass


def new_guarded(**limits) -> GuardedFrames:
    guard = Guard(500, Q, {SILENT})
    return GuardedFrames(guard, TextGuard(WORDS, TextGuardLimits(**limits)), {SILENT}, Q)


def play(guarded, codes, mass, size, ends=False):
    """Feeds frames in chunks until the guard goes back or ends: released frames, and the step."""
    released = [codes[:0]]
    for start in range(0, len(codes), size):
        step = guarded.accept(codes[start : start + size], mass[start : start + size])
        released.append(step.released)
        if step.back or step.is_over:
            return np.concatenate(released), step
    if ends:
        step = guarded.end()
        released.append(step.released)
    return np.concatenate(released), step


GOOD = [0] * 4 + [1] * 4 + [2] * 5 + [3] * 8
sizes = pytest.mark.parametrize("size", [1, 4, 50])


@sizes
def test_speech_that_follows_its_text_passes_unchanged(size):
    codes, mass = frames_of(GOOD, silent=[19, 20])
    released, step = play(new_guarded(), codes, mass, size, ends=True)
    assert step.is_over
    assert step.remark is None
    assert step.back is None
    np.testing.assert_array_equal(released, codes)


@sizes
def test_an_end_before_the_last_word_is_held_down_until_it_is_spoken(size):
    guarded = new_guarded()
    codes, mass = frames_of(GOOD)
    early = 10
    released, step = play(guarded, codes[:early], mass[:early], size, ends=True)
    assert step.back == (early, False, -np.inf)
    assert step.remark.kind == "continued"
    more, step = play(guarded, codes[early:], mass[early:], size)
    # Where most of the last word has been heard the end is allowed again, at the same frame for
    # any chunks.
    assert step.back.end_bias == 0
    assert not step.back.new_seed
    assert step.back.num_frames == 13 + 7
    np.testing.assert_array_equal(np.concatenate([released, more]), codes[:20])


@sizes
@pytest.mark.parametrize("max_retries", [0, 2])
def test_held_speech_that_never_reaches_the_last_word_is_resampled_then_ended(size, max_retries):
    guarded = new_guarded(max_retries=max_retries)
    codes, mass = frames_of([0] * 4 + [1] * 4)
    babble, nothing = frames_of([None] * 60)
    released, _ = play(guarded, codes, mass, size, ends=True)
    for retry in range(max_retries):
        more, step = play(guarded, babble + 1000 * retry, nothing, size)
        released = np.concatenate([released, more])
        assert step.back == (len(codes), True, 0.0)
        assert step.remark.kind == "resampled"
        assert guarded.end().back == (len(codes), False, -np.inf)
    more, step = play(guarded, babble + 1000, nothing, size)
    assert step.is_over
    assert step.remark.kind == "ended"
    np.testing.assert_array_equal(np.concatenate([released, more]), codes)


@sizes
@pytest.mark.parametrize("max_retries", [0, 1])
def test_words_that_are_left_out_after_a_held_end_are_resampled_before_they_are_released(
    size, max_retries
):
    """Without a retry they are released, and never taken back."""
    guarded = new_guarded(max_retries=max_retries)
    codes, mass = frames_of([0] * 4 + [3] * 7 + [1] * 12)
    early = 2
    released, _ = play(guarded, codes[:early], mass[:early], size, ends=True)
    more, step = play(guarded, codes[early:], mass[early:], size)
    released = np.concatenate([released, more])
    assert step.back.new_seed == bool(max_retries)
    assert step.back.num_frames == (4 if max_retries else len(released))
    np.testing.assert_array_equal(released, codes[: len(released)])
    assert len(released) <= step.back.num_frames
    if not max_retries:
        rest = codes[len(released) :], mass[len(released) :]
        _, step = play(guarded, *rest, size, ends=True)
        assert step.back is None
        assert len(guarded.codes) >= len(released)


@sizes
def test_a_loop_before_a_held_end_is_resampled_and_the_end_is_not_held_any_more(size):
    guarded = new_guarded(max_retries=0)
    codes, mass = frames_of([0] * 4 + [2] + [None] * 100)
    codes[5:] = codes[5]
    released, step = play(guarded, codes[:35], mass[:35], size, ends=True)
    assert step.back == (35, False, -np.inf)
    more, step = play(guarded, codes[35:], mass[35:], size)
    released = np.concatenate([released, more])
    assert step.back.new_seed
    assert step.back.end_bias == 0
    assert len(released) == step.back.num_frames < 35
    again, mass = frames_of([1] * 4 + [2] * 5 + [3] * 8, silent=[15, 16])
    _, step = play(guarded, again + 1000, mass, size, ends=True)
    assert step.is_over


@sizes
def test_a_word_that_is_left_out_is_resampled_from_there(size):
    codes, mass = frames_of([0] * 4 + [2] * 5)
    released, step = play(new_guarded(), codes, mass, size)
    assert step.back == (4, True, 0.0)
    assert step.remark.kind == "resampled"
    np.testing.assert_array_equal(released, codes[:4])


@sizes
def test_a_word_that_is_said_again_is_resampled_from_there(size):
    codes, mass = frames_of([0] * 4 + [1] * 4 + [2] * 3 + [0] * 6)
    released, step = play(new_guarded(), codes, mass, size)
    assert step.back == (11, True, 0.0)
    np.testing.assert_array_equal(released, codes[:11])


def test_a_glance_at_another_word_is_no_fault():
    codes, mass = frames_of([0, 0, 2, 0, 0, 1, 1, 0, 1, *([2] * 4), *([3] * 8)])
    released, step = play(new_guarded(), codes, mass, 1, ends=True)
    assert step.is_over
    assert step.remark is None
    np.testing.assert_array_equal(released, codes)


@sizes
def test_speech_after_the_last_word_and_a_pause_is_not_taken(size):
    codes, mass = frames_of([*GOOD, *[3] * 12], silent=[19, 20])
    released, step = play(new_guarded(), codes, mass, size)
    assert step.is_over
    assert step.remark.kind == "ended"
    np.testing.assert_array_equal(released, codes[:21])


@sizes
def test_speech_that_attends_to_the_text_no_more_is_over(size):
    codes, mass = frames_of([*GOOD, *[None] * 12])
    released, step = play(new_guarded(), codes, mass, size)
    assert step.is_over
    assert step.remark.kind == "ended"
    np.testing.assert_array_equal(released, codes[: len(GOOD)])


@sizes
def test_speech_ends_at_the_silence_after_which_its_last_word_fades(size):
    codes, mass = frames_of([*GOOD, *[3] * 8], silent=[19])
    mass[20:, 3] = [0.8, 0.6, 0.6, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5]
    released, step = play(new_guarded(), codes, mass, size)
    assert step.is_over
    assert step.remark.kind == "ended"
    np.testing.assert_array_equal(released, codes[:20])


@sizes
def test_a_stop_consonant_in_the_last_word_does_not_end_it(size):
    codes, mass = frames_of([*GOOD, *[3] * 3], silent=[19])
    mass[20:22, 3] = 0.6
    mass[22:, 3] = 0.9
    released, step = play(new_guarded(), codes, mass, size, ends=True)
    assert step.remark is None
    np.testing.assert_array_equal(released, codes)


def test_a_single_word_need_not_be_attended_to_until_its_end():
    """Much of the attention to the first word of a text is on what comes before it."""
    guard = TextGuard(["one"])
    for mass in [0.5, 0.5, *[0.03] * 8]:
        assert guard.accept(np.array([mass]), False).action.value == "continue"
    assert guard.end().action.value == "end"


def test_after_the_last_retry_the_speech_is_left_as_it_is():
    guarded = new_guarded(max_retries=1)
    codes, mass = frames_of([0] * 4 + [2] * 5)
    play(guarded, codes, mass, 50)
    again, step = play(guarded, codes[4:], mass[4:], 50)
    assert step.back is None
    assert not step.is_over
    np.testing.assert_array_equal(again, codes[4:])


def test_a_symbol_at_the_end_need_not_be_spoken():
    guard = TextGuard(["well", "done", "👍"])
    for word in [0] * 5 + [1] * 9:
        mass = np.zeros(3)
        mass[word] = 0.9
        guard.accept(mass, False)
    assert guard.end().action.value == "end"
