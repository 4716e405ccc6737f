"""The path through the attention: the best of all monotonic paths, by enumeration."""

import itertools

import numpy as np
import pytest

from csm_jax.checkpoints.alignment_heads import AlignmentHeads
from csm_jax.config import tiny
from csm_jax.inference.alignment.speech import PartAlignment
from csm_jax.inference.alignment.timing import energy, time_words
from csm_jax.inference.alignment.tracking import _FLOOR, _SKIP, WordTracker, boundary
from csm_jax.prompt.tokenizer import byte_tokenizer

HEADS = AlignmentHeads(((0, 0),), (0.0,), (1.0,))


def best_by_enumeration(mass: np.ndarray, is_over: bool) -> float:
    """The score of the best path, from all paths."""
    num_frames, num_words = mass.shape
    evidence = np.log(mass + _FLOOR)
    scores = []
    for path in itertools.combinations_with_replacement(range(num_words), num_frames):
        skipped = path[0] + sum(max(0, b - a - 1) for a, b in itertools.pairwise(path))
        if is_over:
            skipped += num_words - 1 - path[-1]
        total = sum(evidence[frame, word] for frame, word in enumerate(path))
        scores.append(total - _SKIP * skipped)
    return max(scores)


def score_of(path: np.ndarray, mass: np.ndarray, is_over: bool) -> float:
    skipped = path[0] + sum(max(0, b - a - 1) for a, b in itertools.pairwise(path))
    if is_over:
        skipped += mass.shape[1] - 1 - path[-1]
    return sum(np.log(mass + _FLOOR)[range(len(path)), path]) - _SKIP * skipped


@pytest.mark.parametrize("is_over", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_path_is_the_best_of_all(seed, is_over):
    random = np.random.default_rng(seed)
    mass = random.dirichlet(np.full(5, 0.2), size=7)[:, :4]
    tracker = WordTracker(4)
    tracker.push(mass)
    path = tracker.path(len(mass), is_over)
    assert (np.diff(path) >= 0).all()
    np.testing.assert_allclose(
        score_of(path, mass, is_over), best_by_enumeration(mass, is_over), rtol=1e-9
    )


def spoken(*lengths: int, num_words: int | None = None) -> np.ndarray:
    """Attention that is on each word for a number of frames, with a little noise."""
    random = np.random.default_rng(len(lengths))
    words = np.repeat(np.arange(len(lengths)), lengths)
    mass = 0.02 * random.random((len(words), num_words or len(lengths)))
    mass[np.arange(len(words)), words] = 0.9
    return mass


def test_chunks_and_rewinds_give_the_same_path():
    mass = spoken(4, 3, 5)
    whole, chunked = WordTracker(3), WordTracker(3)
    whole.push(mass)
    chunked.push(mass[:2])
    chunked.push(np.full((4, 3), 0.3))
    chunked.truncate(2)
    chunked.push(mass[2:7])
    chunked.push(mass[7:])
    np.testing.assert_array_equal(whole.path(12, True), chunked.path(12, True))
    np.testing.assert_array_equal(whole.path(12, True), np.repeat([0, 1, 2], [4, 3, 5]))


def test_a_word_without_attention_is_not_on_the_path():
    mass = np.insert(spoken(4, 5), 1, 0.0, axis=1)
    tracker = WordTracker(3)
    tracker.push(mass)
    assert set(tracker.path(9, True)) == {0, 2}
    words = time_words(["a", "b", "c"], tracker.path(9, True), tracker.mass, HEADS, 0.08)
    assert [word.spoken for word in words] == [True, False, True]
    assert words[1].start == words[1].end == words[0].end
    assert words[1].confidence == 0


def test_without_frames_no_word_is_spoken():
    tracker = WordTracker(2)
    words = time_words(["a", "b"], tracker.path(0, True), tracker.mass, HEADS, 0.08, np.zeros(0))
    assert [(word.spoken, word.start, word.end) for word in words] == [(False, 0.0, 0.0)] * 2


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_a_frame_that_is_shared_moves_the_boundary_by_its_share(share):
    mass = spoken(5, 5)
    mass[5] = 0.9 * np.array([share, 1 - share])
    path = np.repeat([0, 1], [5, 5]) if share < 0.5 else np.repeat([0, 1], [6, 4])
    np.testing.assert_allclose(boundary(mass, path, 1), 5 + share, atol=0.15)


def test_words_of_a_stream_are_those_of_the_whole_and_are_not_taken_back():
    text = "one two three four"
    tokenizer = byte_tokenizer(tiny())
    part = PartAlignment(text, 0, tokenizer, HEADS, tiny(), start=10)
    mass = spoken(5, 4, 6, 7)
    rows = tokenizer.encode(f"[0]{text}")
    attention = np.zeros((len(mass), 1, len(rows)), np.float32)
    starts = [4 + text.index(word) for word in text.split()]
    attention[:, 0, starts] = mass
    streamed = []
    for frame in range(len(mass)):
        part.push(attention[frame : frame + 1])
        new = part.decide(frame + 1, is_over=frame + 1 == len(mass))
        assert all(word.end <= 0.8 + 0.08 * (frame + 1) for word in new)
        streamed += new
    whole = part.words(len(mass), None, 24_000)
    assert [word.text for word in streamed] == text.split()
    for got, expected in zip(streamed, whole, strict=True):
        np.testing.assert_allclose([got.start, got.end], [expected.start, expected.end])
    np.testing.assert_allclose(
        [word.start for word in whole], 0.8 + 0.08 * np.array([0, 5, 9, 15]), atol=0.02
    )


def test_energy_of_a_sine_is_half_its_squared_amplitude():
    time = np.arange(24_000) / 24_000
    decibels = energy(0.5 * np.sin(2 * np.pi * 400 * time), 24_000)
    assert len(decibels) == 101
    np.testing.assert_allclose(decibels[5:-5], 10 * np.log10(0.125), atol=0.3)


def test_a_pause_belongs_to_no_word():
    """Two tones with half a second of silence between them, and before and after."""
    rate = 24_000
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(rate // 2) / rate)
    audio = np.concatenate([np.zeros(4800), tone, np.zeros(rate // 2), tone, np.zeros(4800)])
    frames = round(len(audio) / 1920)
    path = np.repeat([0, 1], [12, frames - 12])
    mass = np.zeros((frames, 2))
    mass[np.arange(frames), path] = 1
    first, second = time_words(["a", "b"], path, mass, HEADS, 0.08, audio, rate)
    times = [first.start, first.end, second.start, second.end]
    np.testing.assert_allclose(times, [0.2, 0.7, 1.2, 1.7], atol=0.03)
