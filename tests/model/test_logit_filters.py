"""Temperature, top-k, top-p, min-p and the repetition penalty, in both forms of each."""

import dataclasses

import jax
import numpy as np
import pytest
from sampling_oracle import (
    FILTERS,
    NEARLY_ONE,
    OFF,
    drawn,
    filtered,
    filtered_probabilities,
    filters,
    repeat,
    softmax,
)

from csm_jax.model.sampling import (
    LogitFilter,
    Sampling,
    _largest_reaching,
    _mass_by_comparison,
    _ordered_bits,
    _prefix_sums_by_comparison,
    _sample_by_comparison,
    _sample_by_search,
    penalize_repetition,
)


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
    for other in (*FILTERS.values(), Sampling(greedy=True)):
        both = repeat(filters(FILTERS[name], other), 16)
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
    "adjacent floats": ([1, np.nextafter(np.float32(1), np.float32(2)), 1, -1], 1, [1]),
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


by_comparison = jax.jit(_mass_by_comparison)


def kept_by_both(logits: np.ndarray, values: LogitFilter) -> tuple[np.ndarray, np.ndarray]:
    return np.isfinite(filtered(logits, values)), np.asarray(by_comparison(logits, values)) > 0


@pytest.mark.parametrize("vocab", [2, 35, 600])
@pytest.mark.parametrize("k", [1, 2, 7, 34, 35, 36, 599, 10**6, 2**31 - 1])
def test_comparison_and_search_give_the_same_top_k(vocab, k):
    logits = hard_rows(vocab)
    sampling = Sampling(temperature=1.0, top_k=k)
    searched, compared = kept_by_both(logits, repeat(filters(sampling), len(logits)))
    np.testing.assert_array_equal(compared, searched)
    possible = np.isfinite(logits).sum(axis=1)
    assert (compared.sum(axis=1) >= np.minimum(possible, k)).all()


@pytest.mark.parametrize("vocab", [2, 35, 600])
@pytest.mark.parametrize("p", [0.0, 1e-38, 1e-4, 0.3, 0.77, 0.999, NEARLY_ONE, 1.0])
def test_comparison_and_search_give_the_same_top_p(vocab, p):
    logits = hard_rows(vocab)
    # Where the cumulative probability is p up to rounding, both results are right.
    probabilities = softmax(logits.astype(np.float64))
    larger = logits[:, None, :] > logits[:, :, None]
    before = np.sum(np.where(larger, probabilities[:, None, :], 0), axis=-1)
    is_clear = ((np.abs(before - p) > 1e-5) | (before == 0)) & np.isfinite(logits)
    values = repeat(filters(OFF), len(logits))._replace(top_p=np.full(60, p, np.float32))
    kept = kept_by_both(logits, values)
    expected = (before < p) | (before == 0)
    for form in kept:
        np.testing.assert_array_equal(form[is_clear], expected[is_clear])
        assert form[np.arange(60), logits.argmax(axis=1)].all()
    assert is_clear[np.isfinite(logits)].mean() > 0.5


def test_a_top_p_of_1_keeps_all_ids_beside_rows_with_top_p():
    """The search is skipped only if no row needs it."""
    logits, p = hard_rows(35), np.tile(np.float32([0.4, 1.0]), 30)
    for kept in kept_by_both(logits, repeat(filters(OFF), 60)._replace(top_p=p)):
        np.testing.assert_array_equal(kept[1::2], np.isfinite(logits)[1::2])
        assert not kept[::2].all()


@pytest.mark.parametrize("name", FILTERS)
def test_comparison_and_search_filter_alike_and_draw_the_same_ids(name):
    """Of 2051 ids, at random numbers and at both ends of what they may be."""
    rng = np.random.default_rng(7)
    logits = rng.normal(scale=3, size=(24, 2051)).astype(np.float32)
    uniform = np.append(rng.random(22, np.float32), [0, NEARLY_ONE])
    values = repeat(filters(FILTERS[name]), len(logits))
    searched, compared = kept_by_both(logits, values)
    probabilities = filtered_probabilities(logits, FILTERS[name])
    # A probability below the least float32 is 0 in one form, and never drawn in the other.
    is_clear = (probabilities == 0) | (probabilities > 1e-30)
    np.testing.assert_array_equal(compared[is_clear], (probabilities > 0)[is_clear])
    np.testing.assert_array_equal(compared[is_clear], searched[is_clear])
    mass = np.asarray(by_comparison(logits, values), np.float64)
    np.testing.assert_allclose(mass / mass.sum(axis=1, keepdims=True), probabilities, atol=1e-6)
    ids = [
        np.asarray(jax.jit(form)(logits, uniform, values))
        for form in (_sample_by_search, _sample_by_comparison)
    ]
    np.testing.assert_array_equal(ids[0][:-1], ids[1][:-1])
    # Nearly at 1, rounding decides which of the last ids it is.
    for last in (form[-1] for form in ids):
        assert mass[-1, last] > 0
        assert probabilities[-1, last + 1 :].sum() < 1e-6


def test_the_greedy_id_by_comparison_is_the_first_of_the_likeliest():
    logits = hard_rows(35)
    values = repeat(filters(Sampling(greedy=True)), len(logits))
    ids = jax.jit(_sample_by_comparison)(logits, np.full(60, NEARLY_ONE), values)
    np.testing.assert_array_equal(ids, logits.argmax(axis=1))


@pytest.mark.parametrize("vocab", [1, 35, 2051])
def test_prefix_sums_by_comparison_equal_numpy(vocab):
    mass = np.random.default_rng(0).random((5, vocab), np.float32)
    expected = np.cumsum(mass, axis=1, dtype=np.float64)
    np.testing.assert_allclose(jax.jit(_prefix_sums_by_comparison)(mass), expected, rtol=1e-5)
