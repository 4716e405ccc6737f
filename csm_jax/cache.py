"""Attention state as plain pytrees: passed in, returned, donated at the jit boundary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from csm_jax.config import LlamaConfig

Array = jax.Array


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one attention layer, each [B, S, K, H]."""

    key: Array
    value: Array


class KVCache(NamedTuple):
    """A preallocated cache of one Llama stack.

    A tuple with an entry per layer, not one stacked array: XLA updates separate buffers in
    place, and copies slices of a stacked one.

    Attributes:
      layers: one `LayerCache` per layer.
      lengths: int32 [B], positions that hold a key; every row of a batch has its own.
    """

    layers: tuple[LayerCache, ...]
    lengths: Array

    @staticmethod
    def create(config: LlamaConfig, batch: int, max_seq_len: int, dtype: jnp.dtype) -> "KVCache":
        shape = (batch, max_seq_len, config.num_kv_heads, config.head_dim)
        layers = tuple(
            LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
            for _ in range(config.num_layers)
        )
        return KVCache(layers, jnp.zeros((batch,), jnp.int32))


def write(cache: LayerCache, key: Array, value: Array, start: Array) -> LayerCache:
    """Writes [B, T, K, H] keys and values of each row at that row's own `start` (int32 [B])."""

    def write_row(row: Array, new: Array, at: Array) -> Array:
        return jax.lax.dynamic_update_slice(row, new, (at, 0, 0))

    return LayerCache(
        jax.vmap(write_row)(cache.key, key, start), jax.vmap(write_row)(cache.value, value, start)
    )


class WindowCache(NamedTuple):
    """The last W keys and values of a sliding-window attention layer, oldest first.

    Kept in order by shifting rather than as a ring: the codec moves 250 short vectors a step,
    which costs nothing next to its convolutions, and positions need no arithmetic modulo W.

    Attributes:
      key, value: [B, W, N, H]; slots that were never filled are zero and are masked by position.
      length: int32 [B], positions seen so far.
    """

    key: Array
    value: Array
    length: Array

    @staticmethod
    def create(
        batch: int, window: int, num_heads: int, head_dim: int, dtype: jnp.dtype
    ) -> "WindowCache":
        shape = (batch, window, num_heads, head_dim)
        # Two arrays, not one twice: a buffer can be donated only once.
        return WindowCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32)
        )
