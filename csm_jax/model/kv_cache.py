"""KV caches as plain pytrees: passed in, returned, donated at the jit boundary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from csm_jax.config import LlamaConfig
from csm_jax.model.layers import Array


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one attention layer.

    Keys lie along the last axis: XLA:CPU multiplies queries with them as they are, where it
    would transpose the whole cache at every step.
    """

    key: Array  # [B, K, H, S]
    value: Array  # [B, K, S, H]


class KVCache(NamedTuple):
    """A preallocated cache of one Llama stack.

    A tuple with an entry per layer, not one stacked array: XLA updates separate buffers in
    place, and copies slices of a stacked one.

    Attributes:
      layers: one `LayerCache` per layer.
      lengths: positions that hold a key, int32 [B], every row of a batch with its own; or [1] if
        all rows are equally long.
    """

    layers: tuple[LayerCache, ...]
    lengths: Array

    @staticmethod
    def create(
        config: LlamaConfig, batch: int, max_seq_len: int, dtype: DTypeLike, num_lengths: int
    ) -> "KVCache":
        """An empty cache; `num_lengths` is the batch size, or 1 if all rows grow together."""
        heads = batch, config.num_kv_heads
        layers = tuple(
            LayerCache(
                key=jnp.zeros((*heads, config.head_dim, max_seq_len), dtype),
                value=jnp.zeros((*heads, max_seq_len, config.head_dim), dtype),
            )
            for _ in range(config.num_layers)
        )
        return KVCache(layers, jnp.zeros((num_lengths,), jnp.int32))


def write(cache: LayerCache, key: Array, value: Array, start: Array) -> LayerCache:
    """Writes T new positions of every row from `start` on.

    Args:
      key: [B, K, H, T].
      value: [B, K, T, H].
      start: int32 [B], or [1] for all rows alike.
    """
    if start.shape[0] == 1:
        return LayerCache(
            jax.lax.dynamic_update_slice_in_dim(cache.key, key, start[0], 3),
            jax.lax.dynamic_update_slice_in_dim(cache.value, value, start[0], 2),
        )
    return jax.vmap(_write_row)(cache, key, value, start)


def _write_row(cache: LayerCache, key: Array, value: Array, start: Array) -> LayerCache:
    return LayerCache(
        jax.lax.dynamic_update_slice_in_dim(cache.key, key, start, 2),
        jax.lax.dynamic_update_slice_in_dim(cache.value, value, start, 1),
    )


class WindowCache(NamedTuple):
    """The last W keys and values of a sliding-window attention layer, oldest first.

    Kept in order by shifting rather than as a ring: the codec moves 250 short vectors a step,
    which costs nothing next to its convolutions, and positions need no arithmetic modulo W.

    Attributes:
      key: [B, N, H, W]; slots that were never filled are zero and are masked by position.
      value: [B, N, W, H].
      length: int32 [B], positions seen so far.
    """

    key: Array
    value: Array
    length: Array

    @staticmethod
    def create(
        batch: int, window: int, num_heads: int, head_dim: int, dtype: DTypeLike
    ) -> "WindowCache":
        """A cache before the first position."""
        heads = batch, num_heads
        return WindowCache(
            key=jnp.zeros((*heads, head_dim, window), dtype),
            value=jnp.zeros((*heads, window, head_dim), dtype),
            length=jnp.zeros((batch,), jnp.int32),
        )
