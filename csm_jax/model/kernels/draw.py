"""The kernel that draws codes."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from csm_jax.model.kernels.blocks import Ref, Span, load, program_span, span, store
from csm_jax.model.kernels.launch import launch
from csm_jax.model.layers import Array
from csm_jax.model.sampling import LogitFilter, filter_logits


def sample(logits: Array, numbers: Array, index: Array, values: LogitFilter) -> Array:
    """Like `sampling.sample`, with `numbers[index]`.

    Args:
      logits: float32 [B, V].
      numbers: float32 [Q, B] in [0, 1).
      index: int32 [1].
      values: the filter of each row.

    Returns:
      int32 [B].
    """
    batch = len(logits)
    code = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return launch(_sample, (batch,), code, logits, numbers, index, values, num_warps=8)


def _sample(logits: Ref, numbers: Ref, index: Ref, values: LogitFilter, code: Ref) -> None:
    """A program has all ids of a row; those that pad it have no mass."""
    row, num_ids = program_span(0, 1, code.shape[0]), logits.shape[1]
    ids = span(0, pl.next_power_of_2(num_ids), num_ids)
    own = LogitFilter(*(load(value, row) for value in values))
    entries = jnp.where(ids.exist[None], load(logits, row, ids), -jnp.inf)
    kept = filter_logits(entries, own)
    mass = jnp.exp(kept - jnp.max(kept, axis=-1, keepdims=True))
    cumulative = jnp.cumsum(mass, axis=-1)
    place = Span(load(index, span(0, 1, 1)), row.exist)
    number = jnp.squeeze(load(numbers, place, row), axis=0)
    drawn = jnp.where(own.greedy, 0.0, number) * jnp.max(cumulative, axis=-1)
    last = jnp.max(jnp.where(mass > 0, ids.ids[None], 0), axis=-1)
    # Rounding in the sums must not draw an id that was filtered out.
    is_reached = (mass > 0) & (cumulative > drawn[:, None])
    first = jnp.min(jnp.where(is_reached, ids.ids[None], num_ids), axis=-1)
    store(code, jnp.minimum(first, last), row)
