"""Sampling: the limits of its values, and draws from one distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_oracle import (
    ACCEPTED,
    FILTERS,
    NEARLY_ONE,
    OFF,
    drawn,
    filtered,
    filtered_probabilities,
    filters,
    p_value,
    repeat,
)
from scipy import stats

from csm_jax.errors import InputError
from csm_jax.model.sampling import LogitFilter, Sampling, SamplingParams

DRAWS, GRID = 20_000, 1024
INF = np.inf


def test_p_value_is_pearsons_chi_square():
    rng = np.random.default_rng(0)
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    draws = rng.choice(4, size=500, p=probabilities)
    expected = stats.chisquare(np.bincount(draws), 500 * probabilities).pvalue
    np.testing.assert_allclose(p_value(draws, probabilities), expected)


# --- Limits -------------------------------------------------------------------------------------

NAN = float("nan")
OUTSIDE = [
    *(("temperature", value, "over 0") for value in (0, 0.0, -0.5, NAN, INF, -INF, 1e-50, 1e50)),
    *(("depth_temperature", value, "over 0") for value in (0, -1.0, NAN, INF)),
    *(("repetition_penalty", value, "over 0") for value in (0, -1.2, NAN, INF, 1e-50, 1e50)),
    *(("top_k", value, "at least 1") for value in (0, -3, 2.5, NAN, INF, -INF)),
    *(("depth_top_k", value, "at least 1") for value in (0, -3, 2.5, NAN)),
    *(("top_p", value, "over 0 and at most 1") for value in (0, -0.1, 1.01, NAN, INF)),
    *(("min_p", value, "at least 0 (off) and under 1") for value in (-0.1, 1, 2, NAN, INF)),
]


@pytest.mark.parametrize(("name", "value", "limit"), OUTSIDE)
def test_values_outside_the_limits_are_refused(name, value, limit):
    with pytest.raises(InputError) as error:
        Sampling(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} is {value}, but must be ")
    assert limit in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "values",
    [{"top_k": 1}, {"top_k": 2**40}, {"top_p": 1}, {"min_p": 0}, {"temperature": 1e-30}],
)
def test_values_at_the_limits_are_accepted(values):
    Sampling(**values)


def test_depth_values_default_to_those_of_the_backbone():
    plain = Sampling(temperature=0.7, top_k=11, top_p=0.8, min_p=0.1)
    own = dataclasses.replace(plain, depth_temperature=1.1, depth_top_k=3)
    depth = SamplingParams.stack([plain, own]).depth_decoder
    np.testing.assert_allclose(depth.temperature, [0.7, 1.1], rtol=1e-6)
    assert depth.top_k.tolist() == [11, 3]
    np.testing.assert_allclose(depth.top_p, [0.8, 0.8], rtol=1e-6)
    np.testing.assert_allclose(depth.min_p, [0.1, 0.1], rtol=1e-6)


# --- Draws --------------------------------------------------------------------------------------

LOGITS = np.array([1.3, -0.4, 0.9, 0.9, 2.1, -2.0, 0.9, 0.0, -0.0, -1.1, 0.4], np.float32)
DISTRIBUTIONS = {
    "off": OFF,
    "defaults": Sampling(),
    "tie at the edge": Sampling(temperature=0.9, top_k=3),
    "tie at the edge of zeros": Sampling(temperature=1.2, top_k=7),
    "hot": Sampling(temperature=2.5, top_k=50),
    "top_p": Sampling(temperature=1.0, top_k=50, top_p=0.8),
    "min_p": Sampling(temperature=1.0, top_k=50, min_p=0.2),
    "all": Sampling(temperature=1.4, top_k=8, top_p=0.95, min_p=0.15),
}


def draw_at(logits: np.ndarray, sampling: Sampling, uniform: np.ndarray) -> np.ndarray:
    rows = np.broadcast_to(logits, (len(uniform), len(logits)))
    ids = drawn(rows, np.float32(uniform), repeat(filters(sampling), len(uniform)))
    assert ids.dtype == np.int32
    return np.asarray(ids)


def draw(logits: np.ndarray, sampling: Sampling, seed: int) -> np.ndarray:
    return draw_at(logits, sampling, np.random.default_rng(seed).random(DRAWS, np.float32))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("vocab", [len(LOGITS), 2051])
def test_evenly_spaced_uniform_numbers_draw_every_id_in_proportion(name, vocab):
    """The inverse of the cumulative distribution in closed form: of N numbers (i + 1/2) / N, an
    interval of length p contains N p up to one, and all of them draw the id of the interval."""
    logits = LOGITS
    if vocab > len(LOGITS):
        logits = np.random.default_rng(0).normal(scale=2, size=vocab).astype(np.float32)
    expected = filtered_probabilities(logits, DISTRIBUTIONS[name])
    uniform = (np.arange(GRID) + 0.5) / GRID
    ids = draw_at(logits, DISTRIBUTIONS[name], uniform)
    counts = np.bincount(ids, minlength=vocab)
    # Sums of 2051 numbers in float32 have errors of about 1e-6.
    assert np.abs(counts - GRID * expected).max() <= 1 + GRID * 1e-5
    assert counts[expected == 0].sum() == 0
    edges = np.cumsum(expected)
    is_clear = np.abs(uniform[:, None] - edges).min(axis=1) > 1e-5
    assert is_clear.mean() > 0.9
    inverted = np.searchsorted(edges, uniform, side="right")
    np.testing.assert_array_equal(ids[is_clear], inverted[is_clear])


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("uniform", [0.0, 1e-38, 2.0**-24, 0.5, NEARLY_ONE])
def test_filtered_ids_are_never_drawn(name, uniform):
    """This holds for 0, and for numbers that rounding puts beyond the last id."""
    logits = np.random.default_rng(8).normal(scale=4, size=(200, 97)).astype(np.float32)
    logits[:50, -20:] = logits[50:100, :20] = -np.inf  # no id can be drawn at either end
    values = repeat(filters(FILTERS[name]), len(logits))
    ids = np.asarray(drawn(logits, np.full(len(logits), uniform, np.float32), values))
    kept = np.isfinite(np.asarray(filtered(logits, values)))
    assert kept[np.arange(len(logits)), ids].all()
    if uniform == 0:
        np.testing.assert_array_equal(ids, first_possible(logits, values))


def first_possible(logits: np.ndarray, values: LogitFilter) -> np.ndarray:
    """The first kept id whose probability is not zero in float32."""
    kept = np.asarray(filtered(logits, values), np.float64)
    return (kept - kept.max(axis=1, keepdims=True) > -87).argmax(axis=1)


def test_a_boundary_belongs_to_the_id_that_starts_there():
    """[0, 1/4) draws the first of four equally likely ids."""
    logits = np.array([-INF, 2, 2, -INF, 2, 2, -INF], np.float32)
    uniform = np.float32([0, 0.25, 0.5, 0.75])
    uniform = np.append(uniform, np.nextafter(uniform[1:], np.float32(0)))
    assert draw_at(logits, OFF, uniform).tolist() == [1, 2, 4, 5, 1, 2, 4]


def test_rounding_of_cumulative_sums_draws_no_filtered_id():
    """2051 numbers are added in blocks, so the sums may rise by rounding at a probability of 0."""
    logits = np.random.default_rng(0).normal(size=(50, 2051)).astype(np.float32)
    values = repeat(filters(Sampling(temperature=1.0, top_k=1000)), len(logits))
    kept = np.asarray(filtered(logits, values))
    mass = np.exp(kept - kept.max(axis=1, keepdims=True))
    sums = np.asarray(jax.jit(jnp.cumsum, static_argnames="axis")(mass, axis=-1))
    rises = (np.diff(sums, axis=1) > 0) & (mass[:, 1:] == 0)
    rows, ids = np.nonzero(rises)
    assert len(rows) > 20
    # Uniform numbers at or near the sum before such a rise.
    quotient = sums[rows, ids] / sums[rows, -1]
    uniform = [np.nextafter(quotient, to) for to in np.float32([0, 1])] + [quotient]
    rows = np.tile(rows, 3)
    drawn_ids = drawn(
        logits[rows], np.concatenate(uniform), repeat(filters(Sampling(1.0, 1000)), len(rows))
    )
    assert np.isfinite(kept[rows, np.asarray(drawn_ids)]).all()


def test_a_uniform_number_below_one_draws_the_last_kept_id():
    logits = np.zeros((1, 2051), np.float32)
    logits[0, [3, 70, 2000]] = 5.0
    values = filters(Sampling(temperature=1.0, top_k=3))
    ids = [int(drawn(logits, np.float32([u]), values)[0]) for u in (0, 0.34, NEARLY_ONE, 1)]
    assert ids == [3, 70, 2000, 2000]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_match_the_definition(name):
    sampling = DISTRIBUTIONS[name]
    draws = draw(LOGITS, sampling, seed=5)
    assert draws.dtype == np.int32
    assert p_value(draws, filtered_probabilities(LOGITS, sampling)) > ACCEPTED


@pytest.mark.parametrize("name", ["defaults", "tie at the edge", "hot"])
def test_draws_match_the_reference(name):
    """The probabilities are those of `sample_topk` of SesameAILabs/csm `models.py`."""
    torch = pytest.importorskip("torch")
    sampling = DISTRIBUTIONS[name]
    logits = torch.tensor(LOGITS)[None] / sampling.temperature
    top_k = min(sampling.top_k, logits.shape[-1])
    indices_to_remove = logits < torch.topk(logits, top_k)[0][..., -1, None]
    scores = torch.log_softmax(logits.masked_fill(indices_to_remove, -float("Inf")), dim=-1)
    expected = torch.nn.functional.softmax(scores, dim=-1)[0].numpy()
    assert p_value(draw(LOGITS, sampling, seed=6), expected) > ACCEPTED


@pytest.mark.parametrize(
    "wrong",
    [
        Sampling(temperature=0.95),
        Sampling(temperature=0.9, top_k=9),
        Sampling(temperature=0.9, top_p=0.97),
        Sampling(temperature=0.9, min_p=0.02),
    ],
    ids=["temperature", "top_k", "top_p", "min_p"],
)
def test_a_slightly_wrong_distribution_is_rejected(wrong):
    draws = draw(LOGITS, wrong, seed=5)
    assert p_value(draws, filtered_probabilities(LOGITS, Sampling(temperature=0.9))) < ACCEPTED


def test_greedy_rows_ignore_temperature_and_filters():
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(64, 20)).astype(np.float32)
    greedy = [
        Sampling(greedy=True),
        Sampling(greedy=True, temperature=100.0, top_k=3),
        Sampling(greedy=True, temperature=1e-3, top_p=0.01, min_p=0.9),
    ]
    for sampling in greedy:
        for uniform in (0.0, 0.5, NEARLY_ONE):
            got = draw_rows(logits, sampling, uniform)
            np.testing.assert_array_equal(got, logits.argmax(axis=1))


def test_greedy_takes_the_first_of_equal_logits():
    rng = np.random.default_rng(9)
    logits = rng.choice([-np.inf, -3.5, -0.0, 0.0, 2.0], size=(200, 60)).astype(np.float32)
    logits[:50] = np.minimum(logits[:50], 0)  # the largest are 0 and -0
    for uniform in (0.0, 0.5, NEARLY_ONE):
        got = draw_rows(logits, Sampling(greedy=True), uniform)
        np.testing.assert_array_equal(got, logits.argmax(axis=1))
    # Sampling draws any of them.
    assert (draw_rows(logits, Sampling(top_k=1), NEARLY_ONE) != logits.argmax(axis=1)).mean() > 0.9


def draw_rows(logits: np.ndarray, sampling: Sampling, uniform: float) -> np.ndarray:
    count = len(logits)
    values = repeat(filters(sampling), count)
    return np.asarray(drawn(logits, np.full(count, uniform, np.float32), values))


def test_extreme_temperatures_draw_valid_ids():
    logits = np.broadcast_to(LOGITS, (2, len(LOGITS)))
    rows = filters(Sampling(temperature=1e-30), Sampling(temperature=1e30))
    kept = filtered(logits, rows)
    assert not np.isnan(kept).any()
    assert drawn(logits, np.float32([0.3, 0.3]), rows)[0] == LOGITS.argmax()
    # At the highest temperature all ids are equally likely.
    ids = draw_at(LOGITS, Sampling(temperature=1e30), (np.arange(GRID) + 0.5) / GRID)
    assert np.abs(np.bincount(ids) - GRID / len(LOGITS)).max() <= 1
