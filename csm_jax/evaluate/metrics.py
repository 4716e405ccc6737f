"""The figures of a configuration: what a report has a row for."""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from csm_jax.errors import InputError
from csm_jax.evaluate.bootstrap import Columns, Statistic
from csm_jax.evaluate.judge import QUALITY, SIMILARITY, WORDS, read_figures
from csm_jax.evaluate.takes import (
    CAP,
    CONTINUED,
    ENDED,
    GUARD_CUT,
    RESAMPLED,
    Take,
    TakeDirectory,
)

# More wrong words than this share of a text's are a failure, not an error (as in seed-tts-eval).
FAILURE = 0.5


@dataclass(frozen=True)
class Metric:
    """A row of the report.

    Attributes:
      name: in the JSON.
      label: in tables.
      of: the figure of columns [..., n]: [...], nan where there is none.
      form: how tables write it.
    """

    name: str
    label: str
    of: Statistic
    form: str = ".3f"


def _reduced(reduce: Callable[..., np.ndarray], column: str) -> Statistic:
    """A statistic of the takes that have a value in a column."""

    def statistic(columns: Columns) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a sample without a value
            return reduce(columns[column], axis=-1)

    return statistic


_mean = functools.partial(_reduced, np.nanmean)
_median = functools.partial(_reduced, np.nanmedian)
_p95 = functools.partial(_reduced, functools.partial(np.nanpercentile, q=95))


def _ratio(numerator: str, denominator: str) -> Statistic:
    """The sum of a column by that of another."""

    def statistic(columns: Columns) -> np.ndarray:
        total = np.nansum(columns[denominator], axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total > 0, np.nansum(columns[numerator], axis=-1) / total, np.nan)

    return statistic


METRICS = (
    Metric("word_error_rate_mean", "word error rate, mean", _mean("word_error_rate")),
    Metric("word_error_rate_median", "word error rate, median", _median("word_error_rate")),
    Metric("word_error_rate_p95", "word error rate, p95", _p95("word_error_rate")),
    Metric("word_error_rate_total", "word error rate, all words", _ratio("errors", "words")),
    Metric("word_error_rate_ended", "word error rate, ended takes", _mean("rate_of_ended")),
    Metric("word_error_rate_cut", "word error rate, cut takes", _mean("rate_of_cut")),
    Metric("failed_share", f"takes over {FAILURE:.0%} wrong", _mean("failed")),
    Metric("missing_share", "missing words", _ratio("deletions", "words")),
    Metric("repeated_share", "repeated words", _ratio("repeated", "words")),
    Metric("ended_share", "takes that ended", _mean("ended")),
    Metric("capped_share", "takes at the cap", _mean("capped")),
    Metric("guard_cut_share", "takes cut by the guard", _mean("guard_cut")),
    Metric("resampled_share", "takes resampled by the guard", _mean("resampled")),
    Metric("continued_share", "takes continued by the guard", _mean("continued")),
    Metric("guard_ended_share", "takes ended by the guard", _mean("guard_ended")),
    Metric("similarity_mean", "speaker similarity", _mean("similarity")),
    Metric("quality_mean", "quality", _mean("quality"), ".2f"),
    Metric("seconds_mean", "seconds of speech", _mean("seconds"), ".2f"),
    Metric("real_time_factor_median", "real-time factor, median", _median("real_time_factor")),
    Metric("first_audio_median", "first audio in s, median", _median("first_audio_seconds")),
    Metric("first_audio_p95", "first audio in s, p95", _p95("first_audio_seconds")),
    Metric("viability", "chunks in time", _ratio("chunks_in_time", "chunks")),
)


@dataclass(frozen=True)
class Results:
    """The takes of a configuration and their figures.

    Attributes:
      name: of the configuration.
      takes: all of them.
      columns: float [n] by name, a value for each take; nan where there is none.
    """

    name: str
    takes: Sequence[Take]
    columns: Columns

    def metrics(self) -> dict[str, float]:
        """All metrics by name; nan where there is none."""
        return {metric.name: float(metric.of(self.columns)) for metric in METRICS}

    def of(self, ids: Sequence[str]) -> Columns:
        """The columns of some takes."""
        places = {take.id: index for index, take in enumerate(self.takes)}
        chosen = np.array([places[each] for each in ids], np.int64)
        return {name: column[chosen] for name, column in self.columns.items()}


def read_results(name: str, directory: TakeDirectory) -> Results:
    """Reads the takes of a configuration and what judges said of them.

    Raises:
      InputError: there are none.
    """
    takes = directory.read()
    if not takes:
        raise InputError(f"{directory.path} has no takes: speak them first")
    judged = [read_figures(directory, kind) for kind in (WORDS, SIMILARITY, QUALITY)]
    rows = [
        _row(take, {k: v for figures in judged for k, v in figures.get(take.key, {}).items()})
        for take in takes
    ]
    columns = {each: np.array([row[each] for row in rows], np.float64) for each in rows[0]}
    return Results(name, takes, columns)


def _row(take: Take, figures: dict[str, Any]) -> dict[str, float | None]:
    """The values of a take by the name of their column; None where there is none."""
    words = figures.get("words")
    counts = {name: figures.get(name) for name in ("deletions", "repeated", "words")}
    errors = None
    if words is not None:
        errors = figures["substitutions"] + figures["deletions"] + figures["insertions"]
    rate = None if errors is None or words is None else errors / max(1, words)
    return counts | {
        "errors": errors,
        "word_error_rate": rate,
        "rate_of_ended": rate if take.ended else None,
        "rate_of_cut": None if take.ended else rate,
        "failed": None if rate is None else rate > FAILURE,
        "similarity": figures.get("similarity"),
        "quality": figures.get("quality"),
        "capped": CAP in take.notices,
        "guard_cut": GUARD_CUT in take.notices,
        "resampled": RESAMPLED in take.notices,
        "continued": CONTINUED in take.notices,
        "guard_ended": ENDED in take.notices,
        "ended": take.ended,
        "seconds": take.seconds,
        "real_time_factor": take.real_time_factor,
        "first_audio_seconds": take.first_audio_seconds,
        "chunks": take.chunks,
        "chunks_in_time": take.chunks_in_time,
    }
