"""The third phase: a report of the configurations, and their differences from a baseline."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm_jax.errors import InputError
from csm_jax.evaluate import plots
from csm_jax.evaluate.bootstrap import Difference, compare
from csm_jax.evaluate.judge import WORDS, read_figures
from csm_jax.evaluate.metrics import METRICS, Results
from csm_jax.evaluate.takes import TakeDirectory
from csm_jax.io.files import replace_file, reporting

JSON, MARKDOWN = "report.json", "report.md"
_MISSING = "-"
_MAX_WORST = 10


@dataclass(frozen=True)
class Comparison:
    """A configuration and its baseline.

    Attributes:
      name, baseline: of the two.
      num_takes: of the same lines in both.
      differences: by the name of the metric; None where one of the two has none.
    """

    name: str
    baseline: str
    num_takes: int
    differences: dict[str, Difference | None]


def compare_results(baseline: Results, results: Results) -> Comparison:
    """Compares the takes of the same texts.

    Raises:
      InputError: there are none.
    """
    texts = {take.id: take.text for take in baseline.takes}
    common = [take.id for take in results.takes if texts.get(take.id) == take.text]
    if not common:
        raise InputError(f"{results.name} and {baseline.name} have no takes of the same texts")
    statistics = {metric.name: metric.of for metric in METRICS}
    differences = compare(baseline.of(common), results.of(common), statistics)
    return Comparison(results.name, baseline.name, len(common), differences)


def write_report(
    out: Path,
    about: dict[str, Any],
    results: Sequence[Results],
    comparisons: Sequence[Comparison],
    directories: Sequence[TakeDirectory],
) -> str:
    """Writes `report.json`, `report.md` and plots; returns the tables in Markdown.

    Args:
      about: what all configurations have in common, by name.
      directories: of the results.

    Raises:
      CSMError: matplotlib is not installed.
      OutputError: a file cannot be written.
    """
    tables = [_table(results), *map(_comparison_table, comparisons)]
    head = ["# Evaluation", "\n".join(f"- {name}: {value}" for name, value in about.items())]
    worst = [_worst(each, directory) for each, directory in zip(results, directories, strict=True)]
    pictures = plots.draw(out, results)
    links = [f"![{name}]({name})" for name in pictures]
    with reporting(f"{out} could not be written"):
        text = "\n\n".join([*head, *tables, *links, *filter(None, worst)]) + "\n"
        replace_file(out / MARKDOWN, text.encode())
        data = json.dumps(_as_json(about, results, comparisons), indent=2) + "\n"
        replace_file(out / JSON, data.encode())
    return "\n\n".join(tables)


def _as_json(
    about: dict[str, Any], results: Sequence[Results], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    configurations = {
        each.name: {
            "takes": len(each.takes),
            **{name: _finite(value) for name, value in each.metrics().items()},
        }
        for each in results
    }
    return {
        **about,
        "configurations": configurations,
        "comparisons": [dataclasses.asdict(each) for each in comparisons],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(results: Sequence[Results]) -> str:
    """A row for each metric, a column for each configuration."""
    figures = [each.metrics() for each in results]
    rows = [["takes", *[str(len(each.takes)) for each in results]]]
    for metric in METRICS:
        cells = [_written(each[metric.name], metric.form) for each in figures]
        if set(cells) != {_MISSING}:
            rows.append([metric.label, *cells])
    return _markdown(["", *[each.name for each in results]], rows)


def _comparison_table(comparison: Comparison) -> str:
    head = f"{comparison.name} less {comparison.baseline}, {comparison.num_takes} takes"
    rows = []
    for metric in METRICS:
        if difference := comparison.differences[metric.name]:
            form = f"+{metric.form}"
            low, high = format(difference.low, form), format(difference.high, form)
            value = format(difference.value, form)
            rows.append([metric.label, value, f"{low} to {high}", f"{difference.p_value:.3f}"])
    return _markdown([head, "difference", "95 % interval", "p"], rows)


def _worst(results: Results, directory: TakeDirectory) -> str:
    """The takes with the most word errors, and what was heard; empty if there are none."""
    figures = read_figures(directory, WORDS)
    rates = results.columns["word_error_rate"]
    order = sorted(range(len(rates)), key=lambda i: -rates[i] if rates[i] > 0 else 0)
    rows = []
    for index in order[:_MAX_WORST]:
        take = results.takes[index]
        if rates[index] > 0:
            line = figures[take.key]
            rows.append([take.id, f"{rates[index]:.2f}", line["reference"], line["heard"]])
    if not rows:
        return ""
    return _markdown([f"most errors of {results.name}", "rate", "text", "heard"], rows)


def _written(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else _MISSING


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
