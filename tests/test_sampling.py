import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from csm_jax import config
from csm_jax.errors import InputError
from csm_jax.model import CSM
from csm_jax.random_weights import random_params
from csm_jax.sampling import (
    LogitFilter,
    Sampling,
    SamplingParams,
    _largest_reaching,
    _ordered_bits,
    _prefix_sums,
    _prefix_sums_by_comparison,
    _top_k_by_comparison,
    _top_k_by_search,
    _top_p_by_comparison,
    _top_p_by_search,
    filter_logits,
    penalize_repetition,
    sample,
)

DRAWS, FRAMES, GRID = 20_000, 8192, 4096
# The largest float32 below 1.
NEARLY_ONE = np.nextafter(np.float32(1), np.float32(0))
# With fixed seeds a correct sampler can fail only when the seeds are changed.
ACCEPTED = 1e-4

OFF = Sampling(temperature=1.0, top_k=10**6)
FILTERS = {
    "off": OFF,
    "defaults": Sampling(),
    "temperature": Sampling(temperature=1.7, top_k=10**6),
    "cold": Sampling(temperature=0.05, top_k=10**6),
    "top_k": Sampling(temperature=1.0, top_k=7),
    "one": Sampling(top_k=1),
    "top_p": Sampling(temperature=1.3, top_k=10**6, top_p=0.8),
    "small_top_p": Sampling(temperature=1.0, top_k=10**6, top_p=1e-3),
    "min_p": Sampling(temperature=1.5, top_k=10**6, min_p=0.1),
    "all": Sampling(temperature=1.4, top_k=20, top_p=0.7, min_p=0.15),
}


# Without jit, every call would compile its `cond` again.
filtered, drawn = jax.jit(filter_logits), jax.jit(sample)


def filters(*rows: Sampling) -> LogitFilter:
    return SamplingParams.stack(list(rows)).backbone


def repeat(params, count: int):
    return jax.tree.map(lambda x: np.repeat(x, count, axis=0), params)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def filtered_probabilities(logits, sampling: Sampling) -> np.ndarray:
    """The definition, in float64: probabilities [..., V] after temperature, top-k, top-p, min-p."""
    logits = np.asarray(logits, np.float64)
    scaled = logits.reshape(-1, logits.shape[-1]) / sampling.temperature
    kth = np.sort(scaled, axis=-1)[:, -min(sampling.top_k, scaled.shape[-1]), None]
    scaled = np.where(scaled >= kth, scaled, -np.inf)
    if sampling.top_p < 1:
        probabilities = softmax(scaled)
        order = np.argsort(-probabilities, axis=-1)
        likeliest_first = np.take_along_axis(probabilities, order, -1)
        reached_before = np.cumsum(likeliest_first, -1) - likeliest_first >= sampling.top_p
        dropped = np.zeros(scaled.shape, bool)
        np.put_along_axis(dropped, order, reached_before, -1)
        scaled = np.where(dropped, -np.inf, scaled)
    probabilities = softmax(scaled)
    limit = sampling.min_p * probabilities.max(axis=-1, keepdims=True)
    return softmax(np.where(probabilities < limit, -np.inf, scaled)).reshape(logits.shape)


def p_value(draws, probabilities) -> float:
    """The probability that counts of draws [n] from probabilities [V] or [n, V] differ this much.

    With one distribution for all draws it is Pearson's chi-square; with a distribution for each
    draw the counts have the covariance that is summed here. Zero if an impossible id was drawn.
    """
    draws = np.asarray(draws)
    probabilities = np.broadcast_to(probabilities, (len(draws), np.shape(probabilities)[-1]))
    if (probabilities[np.arange(len(draws)), draws] == 0).any():
        return 0.0
    possible = probabilities.any(axis=0)
    kept = probabilities[:, possible]
    off = np.bincount(draws, minlength=len(possible))[possible] - kept.sum(axis=0)
    covariance = np.diag(kept.sum(axis=0)) - kept.T @ kept
    statistic = off @ np.linalg.pinv(covariance, rcond=1e-10, hermitian=True) @ off
    return stats.chi2.sf(statistic, possible.sum() - 1)


def test_p_value_is_pearsons_chi_square():
    rng = np.random.default_rng(0)
    probabilities = np.array([0.1, 0.2, 0.3, 0.4])
    draws = rng.choice(4, size=500, p=probabilities)
    expected = stats.chisquare(np.bincount(draws), 500 * probabilities).pvalue
    np.testing.assert_allclose(p_value(draws, probabilities), expected)


# --- Filters ------------------------------------------------------------------------------------


def test_filters_of_each_row_equal_the_definition_with_its_own_values():
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=3, size=(len(FILTERS), 97)).astype(np.float32)
    got = np.asarray(filtered(logits, filters(*FILTERS.values())))
    for row, sampling, expected in zip(got, FILTERS.values(), logits, strict=True):
        expected = filtered_probabilities(expected, sampling)
        np.testing.assert_array_equal(np.isfinite(row), expected > 0, err_msg=str(sampling))
        np.testing.assert_allclose(softmax(row.astype(np.float64)), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", FILTERS)
def test_a_row_does_not_depend_on_the_other_rows(name):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(32, 60)).astype(np.float32)
    uniform = rng.random(32, np.float32)
    alone = drawn(logits[:16], uniform[:16], filters(*[FILTERS[name]] * 16))
    alone_kept = filtered(logits[:16], filters(*[FILTERS[name]] * 16))
    for neighbour in (*FILTERS.values(), Sampling(greedy=True)):
        both = repeat(filters(FILTERS[name], neighbour), 16)
        np.testing.assert_array_equal(filtered(logits, both)[:16], alone_kept)
        np.testing.assert_array_equal(drawn(logits, uniform, both)[:16], alone)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab", [40, 2051])
def test_filters_equal_those_of_transformers(name, vocab):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    sampling = FILTERS[name]
    chain = [
        processors.TemperatureLogitsWarper(float(sampling.temperature)),
        processors.TopKLogitsWarper(sampling.top_k),
    ]
    # As in `generate`, which skips disabled filters: a top-p of 1 would drop underflowing ids.
    if sampling.top_p < 1:
        chain.append(processors.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        chain.append(processors.MinPLogitsWarper(sampling.min_p))
    logits = np.random.default_rng(vocab).normal(scale=3, size=(5, vocab)).astype(np.float32)
    expected = torch.tensor(logits)
    for processor in chain:
        expected = processor(None, expected)
    got = filtered(logits, filters(*[sampling] * 5))
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7, 1e6])
def test_repetition_penalty_equals_that_of_transformers(penalty):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(4, 30)).astype(np.float32)
    logits[:, :2] = 0.0
    ids = rng.integers(0, 30, size=(4, 12))
    seen = np.zeros((4, 30), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    processor = processors.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor(ids), torch.tensor(logits)).numpy()
    got = penalize_repetition(logits, seen, np.full(4, penalty, np.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_each_row_has_its_own_repetition_penalty():
    logits = np.array([[2.0, -2.0, 1.0]] * 3, np.float32)
    seen = np.array([[True, True, False], [True, True, False], [False] * 3])
    got = penalize_repetition(logits, seen, np.array([2.0, 1.0, 2.0], np.float32))
    np.testing.assert_array_equal(got, [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])


INF = np.inf
TOP_K_CASES = {
    "tie across the edge": ([5, 1, 2, 2, 2, 0], 2, [0, 2, 3, 4]),
    "tie just inside": ([5, 1, 2, 2, 2, 0], 4, [0, 2, 3, 4]),
    "edge after the tie": ([5, 1, 2, 2, 2, 0], 5, [0, 1, 2, 3, 4]),
    "tie for the first": ([1, 4, 4, 0], 1, [1, 2]),
    "all equal": ([3, 3, 3, 3], 1, [0, 1, 2, 3]),
    "k is V": ([3, -1, 2, -1], 4, [0, 1, 2, 3]),
    "k over V": ([3, -1, 2, -1], 5, [0, 1, 2, 3]),
    "k far over V": ([3, -1, 2, -1], 2**40, [0, 1, 2, 3]),
    "negative": ([-5, -1, -3, -3, -9, -4], 2, [1, 2, 3]),
    "both signs": ([-1, 1, -2, 2, 0, -3], 3, [1, 3, 4]),
    "two zeros, first": ([0.0, -0.0, -1, 0.0], 1, [0, 1, 3]),
    "two zeros, second": ([-0.0, 1, -1, 0.0], 2, [0, 1, 3]),
    "negative zero over negatives": ([-0.0, -1, -2, -1], 1, [0]),
    "impossible ids": ([-INF, 2, -INF, 1], 1, [1]),
    "impossible ids at the edge": ([-INF, 2, -INF, 1], 3, [1, 3]),
    "huge": ([3e38, -3e38, 1e38, 3e38], 1, [0, 3]),
    "hugely negative": ([-3e38, -2e38, -INF, -3e38], 2, [0, 1, 3]),
    "small": ([1e-30, 2e-30, -1e-30, 2e-30], 3, [0, 1, 3]),
    "neighbouring floats": ([1, np.nextafter(np.float32(1), np.float32(2)), 1, -1], 1, [1]),
}
top_k_cases = pytest.mark.parametrize(
    ("logits", "k", "kept"), TOP_K_CASES.values(), ids=TOP_K_CASES.keys()
)


@top_k_cases
def test_top_k_keeps_ties(logits, k, kept):
    logits = np.asarray([logits], np.float32)
    got = filtered(logits, filters(Sampling(temperature=1.0, top_k=k)))
    assert np.flatnonzero(np.isfinite(got)).tolist() == kept
    np.testing.assert_array_equal(np.asarray(got)[0, kept], logits[0, kept])


@top_k_cases
def test_top_k_equals_the_rule_of_the_reference(logits, k, kept):
    """The rule is copied from `sample_topk` of SesameAILabs/csm `models.py`."""
    torch = pytest.importorskip("torch")
    logits = torch.tensor([logits], dtype=torch.float32)
    indices_to_remove = logits < torch.topk(logits, min(k, logits.shape[-1]))[0][..., -1, None]
    scores = logits.masked_fill(indices_to_remove, -float("Inf"))
    assert np.flatnonzero(torch.isfinite(scores)).tolist() == kept


def test_top_p_keeps_ties_and_at_least_the_likeliest_id():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.15, 0.05]] * 3, np.float32))
    rows = [dataclasses.replace(OFF, top_p=p) for p in (0.5, 0.3, 1e-60)]
    got = filtered(logits, filters(*rows))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in got] == [[0, 1, 2], [0], [0]]


@pytest.mark.parametrize("pool", ["bits", "few values", "zeros"])
def test_largest_reaching_equals_sorting(pool):
    rng = np.random.default_rng(4)
    bits = rng.integers(0, 2**32, size=(300, 37), dtype=np.uint32).view(np.float32)
    values = {
        # Any float except NaN and subnormals, which XLA flushes to zero.
        "bits": np.where(np.isnan(bits) | (np.abs(bits) < 1e-37), 1.0, bits),
        "few values": rng.choice(bits[np.isfinite(bits)][:9], size=bits.shape),
        "zeros": rng.choice(np.array([0.0, -0.0, 1e-37, -1e-37, INF, -INF]), size=bits.shape),
    }[pool].astype(np.float32)
    k = rng.integers(1, 40, size=300)
    descending = -np.sort(-values, axis=1)
    kth = descending[np.arange(300), np.minimum(k, 37) - 1]
    ranks = jax.jit(_ordered_bits)(values)
    threshold = jax.jit(_largest_reaching)(ranks, np.ones_like(values), k.astype(np.float32))
    kept = np.asarray(ranks) >= np.asarray(threshold)[:, None]
    np.testing.assert_array_equal(kept, (values >= kth[:, None]) | (k > 37)[:, None])


# --- The implementations for a GPU --------------------------------------------------------------


def hard_rows(vocab: int) -> np.ndarray:
    """Random logits; rows with equal, zero, negative zero or impossible logits; equal rows."""
    rng = np.random.default_rng(vocab)
    rows = rng.normal(scale=4, size=(60, vocab))
    rows[20:40] = np.round(rows[20:40])
    rows[40:50] = rng.choice([0.0, -0.0, 1.5, -INF], size=(10, vocab))
    rows[10:25][rng.random((15, vocab)) < 0.4] = -INF
    rows[:, 0] = np.where(np.isfinite(rows).any(axis=1), rows[:, 0], 0.0)
    rows[50] = 3.0
    return rows.astype(np.float32)


@pytest.mark.parametrize("vocab", [2, 35, 600])
@pytest.mark.parametrize("k", [1, 2, 7, 34, 35, 36, 599, 10**6, 2**31 - 1])
def test_comparison_and_search_give_the_same_top_k(vocab, k):
    logits, counts = hard_rows(vocab), np.full(60, k, np.int32)
    searched = jax.jit(_top_k_by_search)(logits, counts)
    np.testing.assert_array_equal(jax.jit(_top_k_by_comparison)(logits, counts), searched)
    assert np.asarray(searched).sum(axis=1).min() >= min(k, vocab)


@pytest.mark.parametrize("vocab", [2, 35, 600])
@pytest.mark.parametrize("p", [0.0, 1e-38, 1e-4, 0.3, 0.77, 0.999, NEARLY_ONE, 1.0])
def test_comparison_and_search_give_the_same_top_p(vocab, p):
    logits = hard_rows(vocab)
    # Where the cumulative probability is p up to rounding, both results are right.
    probabilities = softmax(logits.astype(np.float64))
    larger = logits[:, None, :] > logits[:, :, None]
    before = np.sum(np.where(larger, probabilities[:, None, :], 0), axis=-1)
    is_clear = (np.abs(before - p) > 1e-5) | (before == 0)
    kept = [
        np.asarray(jax.jit(form)(logits, np.full(60, p, np.float32)))
        for form in (_top_p_by_search, _top_p_by_comparison)
    ]
    np.testing.assert_array_equal(kept[0][is_clear], kept[1][is_clear])
    np.testing.assert_array_equal(kept[1][is_clear], ((before < p) | (before == 0))[is_clear])
    likeliest = np.arange(60), logits.argmax(axis=1)
    assert kept[0][likeliest].all()
    assert kept[1][likeliest].all()
    assert is_clear.mean() > 0.5


def test_a_top_p_of_1_keeps_all_ids_beside_rows_with_top_p():
    """The search is skipped only if no row needs it."""
    logits, p = hard_rows(35), np.tile(np.float32([0.4, 1.0]), 30)
    for form in (_top_p_by_search, _top_p_by_comparison):
        kept = np.asarray(jax.jit(form)(logits, p))
        assert kept[1::2].all()
        assert not kept[::2].all()


@pytest.mark.parametrize("vocab", [1, 35, 2051])
def test_prefix_sums_of_both_implementations_equal_numpy(vocab):
    mass = np.random.default_rng(0).random((5, vocab), np.float32)
    expected = np.cumsum(mass, axis=1, dtype=np.float64)
    for form in (_prefix_sums, _prefix_sums_by_comparison):
        np.testing.assert_allclose(jax.jit(form)(mass), expected, rtol=1e-5)


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
    sums = np.asarray(jax.jit(_prefix_sums)(mass))
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


# --- Frames -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> CSM:
    tiny = config.tiny()
    graph = nnx.graphdef(nnx.eval_shape(lambda: CSM(tiny, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, random_params(tiny)["csm"])


def draw_frames(model: CSM, hidden, sampling: Sampling, seen=None) -> np.ndarray:
    """Frames [FRAMES, Q], each with its own key and all with one backbone state [D]."""
    vocab = model.config.audio_vocab_size
    seen = np.zeros(vocab, bool) if seen is None else seen
    keys = jax.random.split(jax.random.key(9), FRAMES)
    params = repeat(SamplingParams.stack([sampling]), FRAMES)
    batch = [np.broadcast_to(x, (FRAMES, *x.shape)) for x in (hidden, seen)]
    return np.asarray(jax.jit(model.generate_frame)(batch[0], keys, params, batch[1]))


def test_sampled_frames_match_the_logits_of_the_model(model):
    """Every codebook is tested given those before it, with the depth decoder's sampling values."""
    sampling = Sampling(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, depth_temperature=1.3, depth_top_k=9
    )
    hidden = jax.random.normal(jax.random.key(10), (model.config.backbone.embed_dim,))
    codes = draw_frames(model, hidden, sampling)
    first = filtered_probabilities(model.backbone_logits(hidden), sampling)
    assert p_value(codes[:, 0], first) > ACCEPTED

    batch = jnp.broadcast_to(hidden, (FRAMES, *hidden.shape))
    depth = np.asarray(jax.jit(model.depth_logits)(batch, codes))
    values = dataclasses.replace(sampling, temperature=1.3, top_k=9)
    wrong = dataclasses.replace(values, temperature=sampling.temperature)
    assert p_value(codes[:, 1], filtered_probabilities(depth[:, 0], wrong)) < ACCEPTED
    for codebook in range(1, codes.shape[1]):
        expected = filtered_probabilities(depth[:, codebook - 1], values)
        assert p_value(codes[:, codebook], expected) > ACCEPTED

    # Codebook 1 also has a plain chi-square test, given the likeliest id of codebook 0.
    given = codes[:, 0] == first.argmax()
    expected = filtered_probabilities(depth[given, 0][0], values)
    assert p_value(codes[given, 1], expected) > ACCEPTED


def test_the_repetition_penalty_applies_to_codebook_0_only(model):
    sampling = Sampling(temperature=1.0, top_k=35, repetition_penalty=1.5)
    hidden = jax.random.normal(jax.random.key(11), (model.config.backbone.embed_dim,))
    seen = np.arange(model.config.audio_vocab_size) % 2 == 0
    codes = draw_frames(model, hidden, sampling, seen)
    logits = np.asarray(model.backbone_logits(hidden))
    penalized = np.where(logits > 0, logits / 1.5, logits * 1.5)
    expected = filtered_probabilities(np.where(seen, penalized, logits), sampling)
    assert p_value(codes[:, 0], expected) > ACCEPTED
    assert p_value(codes[:, 0], filtered_probabilities(logits, sampling)) < ACCEPTED
    batch = jnp.broadcast_to(hidden, (FRAMES, *hidden.shape))
    depth = np.asarray(jax.jit(model.depth_logits)(batch, codes))[:, 0]
    assert p_value(codes[:, 1], filtered_probabilities(depth, sampling)) > ACCEPTED


def test_codebooks_use_different_random_numbers(model):
    """With constant logits, every pair of codebooks is uniform over all pairs of ids."""
    graph, state = nnx.split(model)
    state["codebook0_head"]["weight"][...] *= 0
    state["depth_heads"]["weight"][...] *= 0
    blank = nnx.merge(graph, state)
    vocab = model.config.audio_vocab_size
    hidden = jnp.ones((model.config.backbone.embed_dim,))
    codes = draw_frames(blank, hidden, dataclasses.replace(OFF, top_k=vocab))
    for left in range(codes.shape[1]):
        for right in range(left):
            pairs = np.bincount(codes[:, left] * vocab + codes[:, right], minlength=vocab**2)
            assert stats.chisquare(pairs).pvalue > ACCEPTED, (left, right)


# --- Validation ---------------------------------------------------------------------------------

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
