"""Whether the symbols that were read in a recording are those of a mark.

A mark repeats every 21 frames, so symbols agree with those one period later. Those of unmarked
sound agree too, as they change slowly or hardly at all, but no more one period later than some
frames more or less. So the share of agreement at the other distances is what chance gives, and the
agreement at one period is tested against it.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.watermark.message import Key, from_symbols, to_symbols

# Of a recording without a mark to be taken for marked.
MAX_FALSE_RATE = 1e-9
# With less there is too little to count: of an unknown key, and of one that is looked for.
MIN_PERIODS = 5
MIN_KNOWN_PERIODS = 3
# Distances that are compared with the period, in frames more and less than it.
_NEAR = 6


class Verdict(enum.Enum):
    MARKED = "marked"
    NOT_FOUND = "not found"
    TOO_SHORT = "too short"


@dataclass(frozen=True)
class Detection:
    """What was found in a recording.

    Attributes:
      key: the five numbers, if it is marked.
      confidence: share of the symbols that are those of the key, or of the most frequent symbols.
      false_rate: how probable so much agreement is in a recording without a mark, at most.
    """

    verdict: Verdict
    key: Key | None
    confidence: float
    false_rate: float


def decide(
    symbols: np.ndarray, period: int, known: Sequence[Key] = (), num_tries: int = 1
) -> Detection:
    """Judges the symbols of all frames, int [T].

    Args:
      known: keys that are looked for, which takes fewer symbols than to find an unknown one.
      num_tries: shifts of the recording that were tried, of which these symbols are the best.
    """
    if len(symbols) < MIN_KNOWN_PERIODS * period:
        return Detection(Verdict.TOO_SHORT, None, 0.0, 1.0)
    tries = num_tries * (1 + len(known))
    for key in known:
        share, rate = _compare(symbols, to_symbols(key))
        if rate * tries <= MAX_FALSE_RATE:
            return Detection(Verdict.MARKED, key, share, rate * tries)
    if len(symbols) < MIN_PERIODS * period:
        return Detection(Verdict.TOO_SHORT, None, 0.0, 1.0)
    consensus, confidence = find_consensus(symbols, period)
    rate = min(false_rate(symbols, period) * tries, 1.0)
    key = from_symbols(consensus)
    if key is None or rate > MAX_FALSE_RATE:
        return Detection(Verdict.NOT_FOUND, None, confidence, rate)
    return Detection(Verdict.MARKED, key, confidence, rate)


def _compare(symbols: np.ndarray, message: np.ndarray) -> tuple[float, float]:
    """The share of symbols that are those of a message, and how probable so many are by chance.

    The message can start anywhere; how well it fits elsewhere is what chance gives.
    """
    places = np.arange(len(symbols)) % len(message)
    fits = [
        int((symbols == np.roll(message, start)[places]).sum()) for start in range(len(message))
    ]
    fits.sort()
    chance = _upper(fits[-2], len(symbols))
    rate = len(message) * _binomial_tail(fits[-1], len(symbols), chance)
    return fits[-1] / len(symbols), min(rate, 1.0)


def find_consensus(symbols: np.ndarray, period: int) -> tuple[np.ndarray, float]:
    """The most frequent symbol at each place of a period, [period], and its share in [0, 1].

    As the reference: only whole periods count, and the lower of two equally frequent symbols wins.
    """
    rows = symbols[: len(symbols) // period * period].reshape(-1, period)
    counts = np.stack([(rows == symbol).sum(axis=0) for symbol in range(symbols.max() + 1)])
    return counts.argmax(axis=0), float(counts.max(axis=0).sum() / rows.size)


def false_rate(symbols: np.ndarray, period: int) -> float:
    """How probable the agreement at one period is, by what other distances agree, at most."""
    near = [lag for lag in range(period - _NEAR, period + _NEAR + 1) if lag != period]
    chance = max(_upper(*_agreement(symbols, lag)) for lag in near)
    agreeing, count = _agreement(symbols, period)
    return _binomial_tail(agreeing, count, chance)


def _agreement(symbols: np.ndarray, lag: int) -> tuple[int, int]:
    """Symbols that agree with that `lag` frames later, and how many there are."""
    return int((symbols[lag:] == symbols[:-lag]).sum()), len(symbols) - lag


def _upper(agreeing: int, count: int) -> float:
    """A share that the true one hardly exceeds: two standard deviations above the one found."""
    share = (agreeing + 1) / (count + 2)
    return min(share + 2 * math.sqrt(share * (1 - share) / count), 1.0)


def _binomial_tail(agreeing: int, count: int, chance: float) -> float:
    """The probability of `agreeing` or more of `count`, by Chernoff's bound, which is above it."""
    share = agreeing / count
    if share <= chance:
        return 1.0
    if chance <= 0:
        return 0.0
    exponent = share * math.log(share / chance)
    if share < 1:
        exponent += (1 - share) * math.log((1 - share) / (1 - chance))
    return math.exp(-count * exponent)
