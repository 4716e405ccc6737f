"""Paired bootstrap: how certain the difference of a figure of two runs is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

# A sample of columns: arrays [..., n] by name, a value for each take.
Columns = Mapping[str, np.ndarray]
# A figure of each sample, [...].
Statistic = Callable[[Columns], np.ndarray]

RESAMPLES = 2000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The difference of a figure, the second run's less the first's.

    Attributes:
      value: of all takes.
      low, high: its confidence interval of 95 %, from the percentiles of resampled takes.
      p_value: how often a difference of takes drawn at random is as far from its mean as the mean
        is from 0 (two-sided; Efron and Tibshirani, 1993, section 16.4). Low values say that the
        difference is hardly one of chance.
    """

    value: float
    low: float
    high: float
    p_value: float


def compare(
    first: Columns,
    second: Columns,
    statistics: Mapping[str, Statistic],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference | None]:
    """Compares two runs of the same takes, which are resampled together.

    Args:
      first, second: columns [n] of the runs, in the same order of takes.
      statistics: the figures to compare, by name.

    Returns:
      A difference for each figure; None where one of the runs has no such figure.
    """
    num_takes = len(next(iter(first.values())))
    if not num_takes:
        return dict.fromkeys(statistics)
    drawn = np.random.default_rng(seed).integers(0, num_takes, (resamples, num_takes))
    samples = [{name: column[drawn] for name, column in run.items()} for run in (first, second)]
    return {
        name: _difference(
            float(statistic(second) - statistic(first)),
            statistic(samples[1]) - statistic(samples[0]),
        )
        for name, statistic in statistics.items()
    }


def _difference(value: float, resampled: np.ndarray) -> Difference | None:
    """Of a value, and of the same value of resampled takes, float [R]."""
    resampled = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or not len(resampled):
        return None
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    # Rounding must not make a difference of 0 look like one.
    as_far = np.abs(resampled - value) >= abs(value) - 1e-12
    p_value = (1 + int(as_far.sum())) / (1 + len(resampled))
    return Difference(value, float(low), float(high), p_value)
