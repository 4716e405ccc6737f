"""What sampling should do, in float64; and a test of draws against probabilities."""

import jax
import numpy as np
from scipy import stats

from csm_jax.model.sampling import LogitFilter, Sampling, SamplingParams, filter_logits, sample

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
