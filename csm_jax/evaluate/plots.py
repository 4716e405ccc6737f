"""Plots of a report, as PNG."""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.errors import CSMError
from csm_jax.evaluate.metrics import Results
from csm_jax.io.files import replace_file, reporting

_DOTS_PER_INCH = 120
_LINES, _MARKERS = ("-", "--", ":", "-."), "os^Dv"


def draw(out: Path, results: Sequence[Results]) -> list[str]:
    """Draws all plots of the configurations into a directory; returns the names of their files.

    Raises:
      CSMError: matplotlib is not installed.
      OutputError: a file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CSMError(f"{error.name} is missing: pip install 'csm-jax[evaluate]'") from error
    plots = {
        "words.png": _draw_word_errors,
        "lengths.png": _draw_lengths,
        "times.png": _draw_times,
        "voices.png": _draw_voices,
    }
    for name, plot in plots.items():
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        plot(figure, results)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
        with reporting(f"{out / name} could not be written"):
            replace_file(out / name, buffer.getvalue())
    return list(plots)


def _draw_word_errors(figure: Any, results: Sequence[Results]) -> None:
    """The share of takes up to each word error rate."""
    axes = figure.subplots()
    _draw_shares(axes, results, "word_error_rate", "word error rate of a take")


def _draw_lengths(figure: Any, results: Sequence[Results]) -> None:
    """Seconds of speech by the length of the text: what did not end lies apart."""
    axes = figure.subplots()
    for each, marker in zip(results, itertools.cycle(_MARKERS)):
        lengths = np.array([len(take.text) for take in each.takes])
        seconds, ended = each.columns["seconds"], each.columns["ended"] > 0
        (points,) = axes.plot(
            lengths[ended], seconds[ended], marker, fillstyle="none", label=each.name
        )
        axes.plot(lengths[~ended], seconds[~ended], marker, color=points.get_color())
    axes.set(xlabel="characters of the text (filled: cut)", ylabel="seconds of speech")
    _finish(axes)


def _draw_times(figure: Any, results: Sequence[Results]) -> None:
    """The shares of takes up to each real-time factor, and up to each time to the first audio."""
    left, right = figure.subplots(1, 2)
    _draw_shares(left, results, "real_time_factor", "real-time factor of a take")
    _draw_shares(right, results, "first_audio_seconds", "seconds to the first audio")


def _draw_voices(figure: Any, results: Sequence[Results]) -> None:
    """The shares of takes up to each speaker similarity, and up to each quality."""
    left, right = figure.subplots(1, 2)
    _draw_shares(left, results, "similarity", "similarity to the speaker's prompt")
    _draw_shares(right, results, "quality", "quality")


def _draw_shares(axes: Any, results: Sequence[Results], column: str, label: str) -> None:
    """The share of takes whose value is at most that on the horizontal axis."""
    # Curves that are equal in two configurations stay visible.
    for each, line in zip(results, itertools.cycle(_LINES)):
        values = np.sort(each.columns[column][np.isfinite(each.columns[column])])
        if len(values):
            shares = np.arange(len(values) + 1) / len(values)
            axes.step([values[0], *values], shares, line, where="post", label=each.name)
    axes.set(xlabel=label, ylabel="share of takes")
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
