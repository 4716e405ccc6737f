"""From logits to ids: pure functions on float32 [B, V] logits.

Every value is an array with one entry per row, so that rows of a batch can differ and a new
temperature never recompiles. Filters are applied in the order of transformers' processors:
repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.errors import InputError
from csm_jax.io.arguments import fill_defaults, real_number, truth_value, whole_number
from csm_jax.model.layers import AnyArray, Array

_POSITIVE = "over 0 (1e-30 to 1e30)"
_COUNT = "a whole number of at least 1"
_GREEDY = "; for the likeliest id every time use greedy"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How ids are sampled. The defaults are the reference's (SesameAILabs/csm `generator.py`).

    Attributes:
      temperature: divides the logits; over 0.
      top_k: keep the k largest logits and everything equal to the k-th; at least 1.
      top_p: keep the most likely ids until their probability reaches p; in (0, 1], 1 is off.
      min_p: drop ids less likely than `min_p` times the likeliest; in [0, 1), 0 is off.
      repetition_penalty: divides positive and multiplies negative logits of codebook-0 ids that
        this utterance has used; over 0, 1 is off.
      greedy: take the likeliest id, whatever temperature and filters are.
      depth_temperature, depth_top_k: for codebooks 1 and up; None means the same as above.
    """

    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    greedy: bool = False
    depth_temperature: float | None = None
    depth_top_k: int | None = None

    def __post_init__(self):
        fill_defaults(self)
        for name in ("temperature", "depth_temperature"):
            self._set(name, lambda value: 1e-30 <= value <= 1e30, _POSITIVE, _GREEDY)
        for name in ("top_k", "depth_top_k"):
            self._set(name, lambda value: value >= 1 and value % 1 == 0, _COUNT)
        self._set("top_p", lambda value: 0 < value <= 1, "over 0 and at most 1 (1 is off)")
        self._set("min_p", lambda value: 0 <= value < 1, "at least 0 (off) and under 1")
        # In float32, neither the value nor logits multiplied or divided by it are 0 or infinite.
        self._set(
            "repetition_penalty", lambda value: 1e-30 <= value <= 1e30, f"{_POSITIVE}; 1 is off"
        )
        object.__setattr__(self, "greedy", truth_value(self.greedy, "greedy"))

    def _set(
        self, name: str, is_valid: Callable[[float], bool], limit: str, hint: str = ""
    ) -> None:
        """Makes a plain number of a field that is not None. Raises `InputError`."""
        value = getattr(self, name)
        if value is None:
            return
        number = real_number(value, name)
        if not is_valid(number):
            raise InputError(f"{name} is {value}, but must be {limit}{hint}")
        plain = whole_number(value, name) if limit == _COUNT else number
        object.__setattr__(self, name, plain)


class LogitFilter(NamedTuple):
    """Temperature and filters of one distribution, each [B]."""

    temperature: AnyArray  # float32
    top_k: AnyArray  # int32
    top_p: AnyArray  # float32
    min_p: AnyArray  # float32
    greedy: AnyArray  # bool


class SamplingParams(NamedTuple):
    """`Sampling` of every row of a batch, as arrays."""

    backbone: LogitFilter
    depth_decoder: LogitFilter
    repetition_penalty: AnyArray  # float32 [B]

    @staticmethod
    def stack(rows: list[Sampling]) -> "SamplingParams":
        """One entry per row of the batch."""
        depth = [
            dataclasses.replace(
                row,
                temperature=row.depth_temperature or row.temperature,
                top_k=row.depth_top_k or row.top_k,
            )
            for row in rows
        ]
        penalty = np.asarray([row.repetition_penalty for row in rows], np.float32)
        return SamplingParams(_stack_filters(rows), _stack_filters(depth), penalty)


def _stack_filters(rows: list[Sampling]) -> LogitFilter:
    largest = np.iinfo(np.int32).max
    # For k = 1 top-k keeps the likeliest id; of several, sampling then takes the first.
    rows = [Sampling(1.0, 1, greedy=True) if row.greedy else row for row in rows]
    return LogitFilter(
        temperature=np.asarray([row.temperature for row in rows], np.float32),
        top_k=np.asarray([min(row.top_k, largest) for row in rows], np.int32),
        top_p=np.asarray([row.top_p for row in rows], np.float32),
        min_p=np.asarray([row.min_p for row in rows], np.float32),
        greedy=np.asarray([row.greedy for row in rows], bool),
    )


def sample(logits: Array, uniform: Array, values: LogitFilter) -> Array:
    """Draws one id per row, by inverting the cumulative distribution.

    One random number per id costs a fiftieth of the Gumbel noise of `jax.random.categorical`,
    which needs one for every entry of the vocabulary.

    Args:
      logits: float32 [B, V].
      uniform: float32 [B] in [0, 1), of each row.
      values: the filter of each row.

    Returns:
      int32 [B].
    """
    return jax.lax.platform_dependent(
        logits, uniform, values, cuda=_sample_by_comparison, default=_sample_by_search
    )


def _sample_by_search(logits: Array, uniform: Array, values: LogitFilter) -> Array:
    kept = filter_logits(logits, values)
    mass = jnp.exp(kept - jnp.max(kept, axis=-1, keepdims=True))
    cumulative = jnp.cumsum(mass, axis=-1)
    drawn = jnp.where(values.greedy, 0, uniform) * cumulative[:, -1]
    ids = jax.lax.broadcasted_iota(jnp.int32, mass.shape, 1)
    # Rounding in the sums must not draw an id that was filtered out.
    ids_from_drawn = jnp.where((mass > 0) & (cumulative > drawn[:, None]), ids, mass.shape[1])
    last = jnp.max(jnp.where(mass > 0, ids, 0), axis=-1)
    return jnp.minimum(jnp.min(ids_from_drawn, axis=-1), last)


def _sample_by_comparison(logits: Array, uniform: Array, values: LogitFilter) -> Array:
    """Like `_sample_by_search`, in few kernels of a GPU."""
    cumulative = _prefix_sums_by_comparison(_mass_by_comparison(logits, values))
    total = cumulative[:, -1:]
    drawn = jnp.where(values.greedy, 0, uniform)[:, None] * total
    ids = jax.lax.broadcasted_iota(jnp.int32, cumulative.shape, 1)
    # Each sum has the same terms in the same order, so it does not rise at an id without mass; and
    # where rounding leaves no sum over the drawn number, the last id with mass is drawn.
    is_reached = (cumulative > drawn) | (cumulative == total)
    return jnp.min(jnp.where(is_reached, ids, cumulative.shape[1]), axis=-1)


def filter_logits(logits: Array, values: LogitFilter) -> Array:
    """Logits [B, V] over temperature, with the ids that are filtered out set to -inf."""
    kept = _top_k(logits / values.temperature[:, None], values.top_k)
    return _min_p(_top_p(kept, values.top_p), values.min_p)


def penalize_repetition(logits: Array, seen: AnyArray, penalty: AnyArray) -> Array:
    """Makes ids less likely that were used before (Keskar et al., 2019, CTRL).

    Args:
      logits: float32 [B, V].
      seen: bool [B, V].
      penalty: float32 [B].
    """
    factor = penalty[:, None]
    penalized = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(seen, penalized, logits)


def _top_k(logits: Array, k: AnyArray) -> Array:
    ranks = _ordered_bits(logits)
    ones = jnp.ones(logits.shape, jnp.float32)
    # If k exceeds the vocabulary, nothing reaches that count, and everything is kept.
    kept = ranks >= _largest_reaching(ranks, ones, jnp.asarray(k).astype(jnp.float32))[:, None]
    return jnp.where(kept, logits, -jnp.inf)


def _top_p(logits: Array, p: AnyArray) -> Array:
    def search(logits: Array, p: Array) -> Array:
        ranks = _ordered_bits(logits)
        threshold = _largest_reaching(ranks, jax.nn.softmax(logits, axis=-1), p)
        # Every threshold reaches a p that is 0 in float32; the likeliest is kept nevertheless.
        threshold = jnp.minimum(threshold, jnp.max(ranks, axis=-1))
        return (ranks >= threshold[:, None]) | (p[:, None] >= 1)

    # The defaults do not need these passes over the vocabulary.
    everything = jnp.ones(logits.shape, bool)
    kept = jax.lax.cond(jnp.min(p) < 1, search, lambda *_: everything, logits, p)
    return jnp.where(kept, logits, -jnp.inf)


def _min_p(logits: Array, min_p: AnyArray) -> Array:
    # p_i < min_p * p_max, without leaving the log domain; log(0) = -inf keeps everything.
    limit = jnp.max(logits, axis=-1) + jnp.log(min_p)
    return jnp.where(logits < limit[:, None], -jnp.inf, logits)


def _mass_by_comparison(logits: Array, values: LogitFilter) -> Array:
    """Unnormalized probabilities [B, V] after all filters, 0 for ids that are filtered out.

    Each id is compared with each: these V^2 comparisons are one short kernel of a GPU, where a
    search is a chain of them.
    """
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.exp((logits - likeliest) / values.temperature[:, None])
    larger = logits[:, None, :] > logits[:, :, None]  # [B, V, V], never in memory
    num_larger = jnp.sum(larger.astype(jnp.float32), axis=-1)
    likelier = jnp.sum(jnp.where(larger, mass[:, None, :], 0), axis=-1)
    mass = jnp.where(num_larger < values.top_k[:, None].astype(jnp.float32), mass, 0)
    probability = mass / jnp.sum(mass, axis=-1, keepdims=True)
    # Of `likelier * probability / mass < top_p`, where the division would be by 0. What is likelier
    # than an id that top-k keeps is kept also.
    in_nucleus = likelier * probability < values.top_p[:, None] * mass
    in_nucleus |= (num_larger == 0) | (values.top_p[:, None] >= 1)
    # The mass of the likeliest is 1.
    return jnp.where(in_nucleus & (mass >= values.min_p[:, None]), mass, 0)


def _prefix_sums_by_comparison(mass: Array) -> Array:
    """Inclusive prefix sums of each row, [B, V]."""
    ids = jnp.arange(mass.shape[1], dtype=jnp.int32)
    return jnp.sum(jnp.where(ids[None, None, :] <= ids[None, :, None], mass[:, None], 0), -1)


def _ordered_bits(x: Array) -> Array:
    """Converts float32 to int32 in the same order; -0 and 0 are one value."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    lowest = jnp.int32(jnp.iinfo(jnp.int32).min)
    # -0 is the sign bit alone; a compiler removes the addition of 0.0 that would avoid it.
    return jnp.where(bits < 0, lowest - bits, bits)


def _largest_reaching(ranks: Array, weights: Array, target: Array) -> Array:
    """The largest threshold t with `sum(weights[ranks >= t]) >= target`, or the smallest int32.

    With weights of one and target k this is the k-th largest value exactly, ties included; with
    probabilities and target p it is the edge of the nucleus. It finds t bit by bit, so it costs
    32 sums over the vocabulary whatever the target is; a sort costs ten times as much.

    Args:
      ranks: int32 [B, V].
      weights: float32 [B, V].
      target: float32 [B].

    Returns:
      int32 [B].
    """
    lowest = jnp.iinfo(jnp.int32).min
    first, bits = np.int32(0), np.int32(32)  # also where jax counts in 64 bits

    def try_bit(i: Array, threshold: Array) -> Array:
        # From the lowest number up: setting the sign bit of two's complement is adding 2^31,
        # which wraps around to 0.
        candidate = threshold ^ jax.lax.shift_left(jnp.int32(1), np.int32(31) - i)
        reached = jnp.where(ranks >= candidate[:, None], weights, 0)
        return jnp.where(jnp.sum(reached, axis=-1) >= target, candidate, threshold)

    # Unrolled, it takes as long to run and twice as long to compile.
    return jax.lax.fori_loop(first, bits, try_bit, jnp.full(target.shape, lowest, jnp.int32))
