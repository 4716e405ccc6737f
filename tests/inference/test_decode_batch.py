"""Utterances that join, leave and rewind in a decode batch: each equals itself alone."""

import functools

import numpy as np
import pytest
from countdown import (
    CONFIG,
    GREEDY,
    NUM_CODEBOOKS,
    PROMPTS,
    SAMPLED,
    VOCAB,
    count_from,
    countdown,
    counted,
    make_prompt,
    random_weights,
)
from fixtures import generate, up_to_the_end

from csm_jax.inference.decode_batch import DecodeBatch, Rewind, Utterance
from csm_jax.model.sampling import Sampling

KINDS = {"greedy": [GREEDY] * 3, "sampled": SAMPLED}
kinds = pytest.mark.parametrize("sampling", KINDS.values(), ids=KINDS.keys())
# Few shapes are compiled: 33 to 64 positions, in batches of 3.
NUM_FRAMES = 28


@functools.cache
def alone(length: int, sampling: Sampling, seed: int, max_frames: int = NUM_FRAMES) -> np.ndarray:
    prompt = make_prompt(length, seed=length)
    (codes,) = generate(CONFIG, random_weights(), [prompt], [sampling], [seed], max_frames)
    assert len(codes) == max_frames
    return codes


def new_batch(params=None, max_seq_len: int = 64) -> DecodeBatch:
    return DecodeBatch(CONFIG, params or random_weights(), 3, max_seq_len)


def run_on(batch: DecodeBatch, num_frames: int) -> np.ndarray:
    """Codes [B, num_frames, Q] of as many runs as necessary."""
    codes = np.zeros((batch.size, 0, NUM_CODEBOOKS), np.int32)
    while codes.shape[1] < num_frames:
        codes = np.concatenate([codes, batch.run(num_frames - codes.shape[1]).codes], axis=1)
    return codes


@kinds
@pytest.mark.parametrize("schedule", range(4))
def test_utterances_join_and_leave_without_effect_on_others(sampling, schedule):
    """Every utterance has the codes that it has alone, in random schedules of others that join,
    leave and are rewound beside it or were in its slot before."""
    rng = np.random.default_rng(schedule)
    batch = new_batch()
    waiting = [(length, sampling[i % 3], i) for i, length in enumerate((5, 31, 18, 36, 7, 33, 12))]
    running: dict[int, tuple] = {}
    generated: dict[tuple, np.ndarray] = {}
    while waiting or running:
        for index in sorted({0, 1, 2} - running.keys()):
            if waiting and rng.random() < 0.6:
                length, values, seed = running[index] = waiting.pop()
                generated[running[index]] = np.zeros((0, NUM_CODEBOOKS), np.int32)
                prompt = make_prompt(length, seed=length)
                batch.join(index, Utterance(prompt, values, seed, NUM_FRAMES))
        codes = batch.run(int(rng.integers(1, 9))).codes
        for index, each in list(running.items()):
            generated[each] = np.concatenate([generated[each], codes[index]])
            if rng.random() < 0.2:
                generated[each] = generated[each][: rng.integers(0, len(generated[each]) + 1)]
                batch.rewind(index, Rewind(generated[each], seed=each[2]))
            if len(generated[each]) == NUM_FRAMES or rng.random() < 0.05:
                batch.leave(index)
                del running[index]
    assert max(map(len, generated.values())) == NUM_FRAMES
    for each, codes in generated.items():
        np.testing.assert_array_equal(codes, alone(*each)[: len(codes)])


@pytest.mark.parametrize("lengths", [(5, 31), (31, 5), (31, 31), (20, 36)], ids=str)
def test_the_utterance_before_in_a_slot_has_no_effect(lengths):
    batch = new_batch()
    for length in lengths:
        prompt = make_prompt(length, seed=length)
        batch.join(1, Utterance(prompt, SAMPLED[0], 3, NUM_FRAMES))
        codes = run_on(batch, NUM_FRAMES)[1]
        batch.leave(1)
    np.testing.assert_array_equal(codes, alone(lengths[1], SAMPLED[0], 3))


def test_the_length_of_the_cache_has_no_effect():
    batch = new_batch(max_seq_len=512)
    batch.join(1, Utterance(PROMPTS[1], SAMPLED[1], 5, NUM_FRAMES))
    np.testing.assert_array_equal(run_on(batch, NUM_FRAMES)[1], alone(18, SAMPLED[1], 5))


def test_an_utterance_longer_than_its_slot_is_refused():
    batch = new_batch(max_seq_len=40)
    with pytest.raises(ValueError, match=r"31 \+ 10 positions in 40"):
        batch.join(0, Utterance(PROMPTS[2], GREEDY, 0, 10))
    batch.join(0, Utterance(PROMPTS[2], GREEDY, 0, 9))


# --- Rewinding ----------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("num_kept", [0, 1, 9, 20])
def test_rewinding_with_the_same_seed_gives_the_same_codes(sampling, num_kept):
    """And leaves the utterance beside it as it is."""
    batch = new_batch()
    for index in range(2):
        batch.join(index, Utterance(PROMPTS[index], sampling[index], index, 33))
    codes = run_on(batch, 20)
    other = [codes[1]]
    for _ in range(2):
        batch.rewind(0, Rewind(codes[0, :num_kept], seed=0))
        if num_kept == 20:
            break
        again = run_on(batch, min(6, 20 - num_kept))
        np.testing.assert_array_equal(again[0], codes[0, num_kept:][: again.shape[1]])
        other.append(again[1])
    expected = generate(CONFIG, random_weights(), PROMPTS[1:2], sampling[1:2], [1], 33)[0]
    other = np.concatenate(other)
    np.testing.assert_array_equal(other, expected[: len(other)])


def test_rewinding_with_another_seed_changes_the_codes():
    """After the frames that are kept: with greedy sampling, which no seed changes, the rest is the
    same; so the first frames are all there."""
    for values, is_same in ((GREEDY, True), (Sampling(top_k=VOCAB), False)):
        batch = new_batch()
        batch.join(0, Utterance(PROMPTS[1], values, 0, 28))
        codes = run_on(batch, 20)[0]
        batch.rewind(0, Rewind(codes[:8], seed=1))
        other = run_on(batch, 12)[0]
        assert np.array_equal(other, codes[8:]) == is_same
        batch.rewind(0, Rewind(np.concatenate([codes[:8], other[:3]]), seed=1))
        np.testing.assert_array_equal(run_on(batch, 9)[0], other[3:])


def test_frames_that_were_rewound_are_not_penalized():
    sampling = Sampling(greedy=True, repetition_penalty=1e6)
    batch = new_batch()
    batch.join(0, Utterance(PROMPTS[1], sampling, 0, 28))
    codes = run_on(batch, 20)[0]
    assert len(set(codes[:, 0])) > 12
    for num_kept in (0, 7):
        batch.rewind(0, Rewind(codes[:num_kept], seed=0))
        np.testing.assert_array_equal(run_on(batch, 20 - num_kept)[0], codes[num_kept:])


def test_rewinding_after_the_end_of_speech():
    batch = new_batch(countdown())
    batch.join(1, Utterance(count_from(6), GREEDY, 0, 40))
    codes, _, ended = batch.run(20)
    np.testing.assert_array_equal(up_to_the_end(codes[1]), counted(6))
    assert ended.all()
    assert batch.run(20).codes.shape == (3, 0, NUM_CODEBOOKS)
    batch.rewind(1, Rewind(codes[1, :2], seed=1))
    again, _, ended = batch.run(20)
    np.testing.assert_array_equal(again, codes[:, 2:])
    assert ended.all()


# --- How far a run goes -------------------------------------------------------------------------


def test_a_run_with_pause_stops_when_a_row_ends():
    """Rows that had ended before, and free ones, do not pause it."""
    batch = new_batch(countdown())
    batch.join(0, Utterance(count_from(3), GREEDY, 0, 30))
    batch.join(2, Utterance(count_from(9), GREEDY, 0, 30))
    runs = [batch.run(25, pause=True) for _ in range(3)]
    assert [run.codes.shape[1] for run in runs] == [3, 6, 0]
    assert [run.done.tolist() for run in runs] == [[True, True, False], [True] * 3, [True] * 3]
    codes = np.concatenate([run.codes for run in runs], axis=1)
    for row, count in zip(codes, (3, 1, 9), strict=True):
        np.testing.assert_array_equal(up_to_the_end(row), counted(count))


def test_a_run_stops_at_the_limit_of_a_row():
    batch = new_batch()
    batch.join(0, Utterance(PROMPTS[0], GREEDY, 0, NUM_FRAMES))
    batch.join(1, Utterance(PROMPTS[1], GREEDY, 0, 4))
    first = batch.run(25).codes
    assert first.shape[1] == 4
    assert batch.run(25).codes.shape[1] == 0
    batch.leave(1)
    codes = np.concatenate([first[0], run_on(batch, NUM_FRAMES - 4)[0]])
    np.testing.assert_array_equal(codes, alone(5, GREEDY, 0))
    assert batch.run(25).codes.shape[1] == 0
    batch.rewind(0, Rewind(codes[:22], seed=0))
    assert batch.run(25).codes.shape[1] == NUM_FRAMES - 22
