"""From a path to times: words with their starts and ends, sharpened by the sound.

Axes: T frames, W words, E energies (one in 10 ms).
"""

from collections.abc import Sequence

import numpy as np

from csm_jax.checkpoints.alignment_heads import AlignmentHeads
from csm_jax.inference.alignment.tracking import boundary
from csm_jax.inference.alignment.words import Word

# Seconds between two energies, and what each of them covers.
STEP, WINDOW = 0.01, 0.025
# A boundary is moved to less energy: how far at most, about, and how much the energy weighs.
_REACH, _WEIGHT = 0.04, 0.5
# A pause is this much quieter than the loud parts of the speech, for this many seconds.
_PAUSE_DB, _SHORTEST_PAUSE = 35.0, 0.2


def time_words(
    texts: Sequence[str],
    path: np.ndarray,
    mass: np.ndarray,
    heads: AlignmentHeads,
    frame_seconds: float,
    audio: np.ndarray | None = None,
    sample_rate: int = 24_000,
) -> list[Word]:
    """The words of a text with their times.

    They are in order and do not overlap.

    Args:
      texts: [W], the words as they are written.
      path: int [T], of `WordTracker.path`.
      mass: float [at least T, W], how much the model attended to each word.
      frame_seconds: duration of a frame.
      audio: float [num_samples], the speech of the frames; None leaves the times as they are.
    """
    seconds = len(mass) * frame_seconds
    spoken = sorted(set(path.tolist()))
    if not spoken:
        return [Word(text, 0.0, 0.0, 0.0, spoken=False) for text in texts]
    starts = [
        min(seconds, max(0.0, boundary(mass, path, word) * frame_seconds + heads.lag(word)))
        for word in spoken
    ]
    starts = np.maximum.accumulate(starts)
    ends = np.append(starts[1:], seconds)
    if audio is not None and len(audio):
        energies = energy(audio, sample_rate)
        starts, ends = _sharpen(energies, starts, seconds)
    times = dict(zip(spoken, zip(starts.tolist(), ends.tolist(), strict=True), strict=True))
    return [_word(texts[i], i, times, path, mass, heads) for i in range(len(texts))]


def energy(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Energy in decibels, float [E], one in 10 ms, of 25 ms around it."""
    step, half = round(STEP * sample_rate), round(WINDOW * sample_rate / 2)
    squares = np.concatenate([[0.0], np.cumsum(np.square(audio, dtype=np.float64))])
    centers = np.arange(0, len(audio) + 1, step)
    first, last = np.maximum(centers - half, 0), np.minimum(centers + half, len(audio))
    power = (squares[last] - squares[first]) / np.maximum(last - first, 1)
    return 10 * np.log10(np.maximum(power, 0) + 1e-10)


def _sharpen(
    energies: np.ndarray, starts: np.ndarray, seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Moves boundaries to where there is less energy, and out of pauses.

    Returns:
      Starts and ends, float [W], in order.
    """
    is_pause = _pauses(energies)
    deviation = max(float(np.std(energies)), 1e-3)
    places = np.arange(len(energies)) * STEP
    new_starts, ends = [], []
    for start in starts:
        price = np.square((places - start) / _REACH) + _WEIGHT * energies / deviation
        first, last = _pause_around(is_pause, int(np.argmin(price)))
        new_starts.append(last * STEP)
        ends.append(first * STEP)
    sounds = np.flatnonzero(~is_pause)
    ends = np.array([*ends[1:], (sounds[-1] + 1) * STEP])
    new_starts[0] = max(new_starts[0], sounds[0] * STEP)
    new_starts = np.clip(np.maximum.accumulate(new_starts), 0, seconds)
    following = np.append(new_starts[1:], seconds)
    return new_starts, np.clip(ends, new_starts, following)


def _pauses(energies: np.ndarray) -> np.ndarray:
    """Which places are in a pause, bool [E]: quiet for longer than a stop consonant is."""
    is_quiet = energies < np.percentile(energies, 95) - _PAUSE_DB
    edges = np.flatnonzero(np.diff(is_quiet.astype(int), prepend=0, append=0)).reshape(-1, 2)
    is_pause = np.zeros(len(energies), bool)
    for first, last in edges:
        at_an_end = first == 0 or last == len(energies)
        is_pause[first:last] = at_an_end or (last - first) * STEP >= _SHORTEST_PAUSE
    return is_pause


def _pause_around(is_pause: np.ndarray, place: int) -> tuple[int, int]:
    """The first place of a pause, and the first after it; both `place` if there is none."""
    first = last = place
    while last < len(is_pause) and is_pause[last]:
        last += 1
    while first > 0 and is_pause[place] and is_pause[first - 1]:
        first -= 1
    return first, last


def _word(
    text: str,
    index: int,
    times: dict[int, tuple[float, float]],
    path: np.ndarray,
    mass: np.ndarray,
    heads: AlignmentHeads,
) -> Word:
    if index in times:
        start, end = times[index]
        share = float(mass[: len(path)][path == index, index].mean())
        return Word(text, start, end, min(1.0, share / heads.mass(index)))
    # Where the words before it end.
    missing = max((end for word, (_, end) in times.items() if word < index), default=0.0)
    return Word(text, missing, missing, 0.0, spoken=False)
