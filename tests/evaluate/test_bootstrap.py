"""The paired bootstrap, against closed forms and scipy."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from csm_jax.evaluate.bootstrap import compare

SIZE = 400


def mean(columns):
    return np.mean(columns["x"], axis=-1)


def ratio(columns):
    return np.sum(columns["x"], axis=-1) / np.sum(columns["y"], axis=-1)


def draw(shift: float, noise: float = 0.3) -> tuple[dict, dict]:
    """Two runs whose values vary together, by much more than their difference."""
    random = np.random.default_rng(1)
    shared = random.standard_normal(SIZE)
    return tuple(
        {
            "x": shared + offset + noise * random.standard_normal(SIZE),
            "y": 5 + random.random(SIZE),
        }
        for offset in (0.0, shift)
    )


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.06])
def test_a_difference_of_means_is_as_certain_as_that_of_a_normal_distribution(shift):
    """By the central limit theorem, for the mean of 400 differences."""
    first, second = draw(shift)
    differences = second["x"] - first["x"]
    error = differences.std() / math.sqrt(SIZE)
    found = compare(first, second, {"x": mean}, resamples=20_000)["x"]
    assert found.value == pytest.approx(differences.mean())
    assert found.low == pytest.approx(differences.mean() - 1.96 * error, abs=0.05 * error)
    assert found.high == pytest.approx(differences.mean() + 1.96 * error, abs=0.05 * error)
    expected = 2 * NormalDist().cdf(-abs(differences.mean()) / error)
    assert found.p_value == pytest.approx(expected, abs=0.02)


def test_the_interval_of_a_ratio_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    first, second = draw(0.1)

    def difference(x0, y0, x1, y1, axis=-1):
        return x1.sum(axis) / y1.sum(axis) - x0.sum(axis) / y0.sum(axis)

    expected = stats.bootstrap(
        (first["x"], first["y"], second["x"], second["y"]),
        difference,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    )
    found = compare(first, second, {"x": ratio}, resamples=20_000)["x"]
    spread = expected.standard_error
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.05 * spread)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.05 * spread)


def test_equal_runs_do_not_differ():
    run, _ = draw(0.0)
    found = compare(run, run, {"x": mean})["x"]
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_one_chance_in_twenty_of_equal_models_is_called_significant():
    """The share of p values under 0.05 where only chance makes the difference."""
    random = np.random.default_rng(3)
    p_values = []
    for _ in range(400):
        first, second = ({"x": random.standard_normal(60)} for _ in range(2))
        p_values.append(compare(first, second, {"x": mean}, resamples=500)["x"].p_value)
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.025)


def test_a_figure_that_one_of_the_runs_lacks_is_none():
    first, second = draw(0.0)
    second["x"] = np.full(SIZE, np.nan)
    assert compare(first, second, {"x": mean}) == {"x": None}
