"""From logits to ids: pure functions on float32 [B, V] logits.

Every value is an array with one entry per row, so that rows of a batch can differ and a new
temperature never recompiles. The filters apply in the order of transformers' processors:
repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.errors import InputError

Array = jax.Array

_POSITIVE = "over 0 (1e-30 to 1e30)"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How ids are drawn. The defaults are the reference's (SesameAILabs/csm `generator.py`).

    Attributes:
      temperature: divides the logits; over 0.
      top_k: keep the k largest logits and everything equal to the k-th; at least 1.
      top_p: keep the most likely ids until their probability reaches p; in (0, 1], 1 is off.
      min_p: drop ids less likely than `min_p` times the likeliest; in [0, 1), 0 is off.
      repetition_penalty: divides positive and multiplies negative logits of codebook-0 ids that
        this utterance has used; over 0, 1 is off.
      greedy: take the likeliest id; temperature and filters do not matter then.
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
        _require(_positive(self.temperature), "temperature", self.temperature, _POSITIVE, True)
        _require(_count(self.top_k), "top_k", self.top_k, "a whole number of at least 1")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "over 0 and at most 1 (1 is off)")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "at least 0 (off) and under 1")
        penalty = self.repetition_penalty
        _require(_positive(penalty), "repetition_penalty", penalty, f"{_POSITIVE}; 1 is off")
        if self.depth_temperature is not None:
            value = self.depth_temperature
            _require(_positive(value), "depth_temperature", value, _POSITIVE, True)
        if self.depth_top_k is not None:
            value = self.depth_top_k
            _require(_count(value), "depth_top_k", value, "a whole number of at least 1")


def _positive(value: float) -> bool:
    # As float32, and with logits multiplied or divided by it, neither 0 nor infinite.
    return 1e-30 <= value <= 1e30


def _count(value: int) -> bool:
    return value >= 1 and value % 1 == 0


def _require(ok: bool, name: str, value: float, limit: str, greedy_hint: bool = False) -> None:
    if not ok:
        hint = "; for the likeliest id every time use greedy" if greedy_hint else ""
        raise InputError(f"{name} is {value}, but must be {limit}{hint}")


class Filter(NamedTuple):
    """The values that shape one distribution, each [B]."""

    temperature: Array  # float32
    top_k: Array  # int32
    top_p: Array  # float32
    min_p: Array  # float32
    greedy: Array  # bool


class SamplingParams(NamedTuple):
    """`Sampling` of every row of a batch, as arrays."""

    backbone: Filter
    depth_decoder: Filter
    repetition_penalty: Array  # float32 [B]

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


def _stack_filters(rows: list[Sampling]) -> Filter:
    largest = np.iinfo(np.int32).max
    return Filter(
        temperature=np.asarray([row.temperature for row in rows], np.float32),
        top_k=np.asarray([min(row.top_k, largest) for row in rows], np.int32),
        top_p=np.asarray([row.top_p for row in rows], np.float32),
        min_p=np.asarray([row.min_p for row in rows], np.float32),
        greedy=np.asarray([row.greedy for row in rows], bool),
    )


def sample(logits: Array, keys: Array, values: Filter) -> Array:
    """Draws one id per row.

    Args:
      logits: float32 [B, V].
      keys: one PRNG key per row [B]: what a row draws does not depend on its neighbours.
      values: the filter of each row.

    Returns:
      int32 [B].
    """
    kept = filter_logits(logits, values)
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    likeliest = jnp.argmax(logits, axis=-1)
    return jnp.where(values.greedy, likeliest, drawn).astype(jnp.int32)


def filter_logits(logits: Array, values: Filter) -> Array:
    """Logits over temperature, with everything that may not be drawn set to -inf. [B, V]."""
    logits = logits / values.temperature[:, None]
    kept = _top_k(logits, values.top_k)
    # A pass over the vocabulary that the defaults do not need.
    kept = jax.lax.cond(
        jnp.any(values.top_p < 1), lambda x: _top_p(x, values.top_p), lambda x: x, kept
    )
    return _min_p(kept, values.min_p)


def penalise_repetition(logits: Array, seen: Array, penalty: Array) -> Array:
    """Makes ids that were used less likely (Keskar et al., 2019, CTRL).

    Args:
      logits: float32 [B, V].
      seen: bool [B, V].
      penalty: float32 [B].
    """
    factor = penalty[:, None]
    penalised = jnp.where(logits > 0, logits / factor, logits * factor)
    return jnp.where(seen, penalised, logits)


def _top_k(logits: Array, k: Array) -> Array:
    ranks = _ordered_bits(logits)
    ones = jnp.ones(logits.shape, jnp.float32)
    # More ids than the vocabulary has: nothing reaches that count, and everything is kept.
    threshold = _largest_reaching(ranks, ones, k.astype(jnp.float32))
    return jnp.where(ranks >= threshold[:, None], logits, -jnp.inf)


def _top_p(logits: Array, p: Array) -> Array:
    probabilities = jax.nn.softmax(logits, axis=-1)
    ranks = _ordered_bits(logits)
    threshold = _largest_reaching(ranks, probabilities, p)
    # Every threshold reaches a p that is 0 in float32; the likeliest stays all the same.
    threshold = jnp.minimum(threshold, jnp.max(ranks, axis=-1))
    off = p[:, None] >= 1
    return jnp.where((ranks >= threshold[:, None]) | off, logits, -jnp.inf)


def _min_p(logits: Array, min_p: Array) -> Array:
    # p_i < min_p * p_max, without leaving the log domain; log(0) = -inf keeps everything.
    limit = jnp.max(logits, axis=-1) + jnp.log(min_p)
    return jnp.where(logits < limit[:, None], -jnp.inf, logits)


def _ordered_bits(x: Array) -> Array:
    """float32 -> uint32 that sorts the same way; -0 and 0 are one value."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # -0 is the sign alone; adding 0.0 to be rid of it does nothing once compiled.
    return jnp.where(bits > sign, ~bits, bits | sign)


def _largest_reaching(ranks: Array, weights: Array, target: Array) -> Array:
    """The largest threshold t with `sum(weights[ranks >= t]) >= target`, or 0 if there is none.

    With weights of one and target k this is the k-th largest value exactly, ties included; with
    probabilities and target p it is the edge of the nucleus. It finds four bits of t at a time,
    so it costs eight sums over the vocabulary whatever the target is, where a sort costs more
    than the rest of the sampling together.

    Args:
      ranks: uint32 [B, V].
      weights: float32 [B, V].
      target: float32 [B].

    Returns:
      uint32 [B].
    """
    digits = jnp.arange(1, 16, dtype=jnp.uint32)
    threshold = jnp.zeros(target.shape, jnp.uint32)
    for shift in range(28, -1, -4):
        candidates = threshold[:, None] | (digits << shift)[None, :]  # [B, 15]
        reached = ranks[:, None, :] >= candidates[:, :, None]  # [B, 15, V]
        mass = jnp.sum(jnp.where(reached, weights[:, None, :], 0.0), axis=-1)
        # Mass falls as the digit grows, so the digits that reach the target come first.
        digit = jnp.sum(mass >= target[:, None], axis=-1, dtype=jnp.uint32)
        threshold = threshold | (digit << shift)
    return threshold
