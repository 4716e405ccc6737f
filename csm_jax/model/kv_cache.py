"""KV caches as plain pytrees: passed in, returned, donated at the jit boundary."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from csm_jax.config import LlamaConfig
from csm_jax.model.layers import SHORT, Array, per_channel
from csm_jax.model.sharding import rows_are_divided


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one attention layer, [B, K, H, S] each.

    Positions lie along the last axis: XLA:CPU multiplies queries with keys as they are, where it
    would transpose the whole cache at every step; and a TPU, which pads a last axis of 64 to 128,
    would make another copy of the values.
    """

    key: Array
    value: Array


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
        shape = batch, config.num_kv_heads, config.head_dim, max_seq_len
        layers = tuple(
            LayerCache(key=jnp.zeros(shape, dtype), value=jnp.zeros(shape, dtype))
            for _ in range(config.num_layers)
        )
        return KVCache(layers, jnp.zeros((num_lengths,), jnp.int32))


def write(cache: LayerCache, key: Array, value: Array, start: Array) -> LayerCache:
    """Writes T new positions of every row from `start` on.

    Args:
      key, value: [B, K, H, T].
      start: int32 [B], or [1] for all rows alike.
    """
    if start.shape[0] == 1:
        if key.shape[3] > 1:
            return _write_rows_alike(cache, key, value, start)
        forms = {"cpu": _write_values_in_a_loop}
        # A GPU copies a short cache in the kernel that computes its new position. Of several rows
        # XLA would transpose the copy, in a kernel more than it saves.
        if cache.key.shape[0] == 1 and cache.key.shape[3] <= SHORT:
            forms["cuda"] = _write_one_position
        return jax.lax.platform_dependent(
            cache, key, value, start, **forms, default=_write_rows_alike
        )
    if rows_are_divided():
        return jax.vmap(_write_row)(cache, key, value, start)
    return jax.lax.platform_dependent(
        cache, key, value, start, tpu=_write_rows_in_turn, default=jax.vmap(_write_row)
    )


def _write_rows_alike(cache: LayerCache, key: Array, value: Array, start: Array) -> LayerCache:
    return LayerCache(_put(cache.key, key, start), _put(cache.value, value, start))


def _put(whole: Array, new: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, new, start[0], 3)


def _write_values_in_a_loop(
    cache: LayerCache, key: Array, value: Array, start: Array
) -> LayerCache:
    """Writes values in a loop of one pass.

    XLA:CPU would compute a write that it can move into the product that reads the values twice,
    there and here, and copy all of the cache for that. It moves nothing out of a loop.
    """
    once = jnp.minimum(start[0], 0) + 1  # 1, which a compiler does not know
    values = jax.lax.fori_loop(0, once, lambda _, before: _put(before, value, start), cache.value)
    return LayerCache(_put(cache.key, key, start), values)


def _write_one_position(cache: LayerCache, key: Array, value: Array, start: Array) -> LayerCache:
    here = per_channel(jnp.arange(cache.key.shape[3], dtype=jnp.int32) == start, key)
    return LayerCache(jnp.where(here, key, cache.key), jnp.where(here, value, cache.value))


def _write_row(cache: LayerCache, key: Array, value: Array, start: Array) -> LayerCache:
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
    return LayerCache(put(cache.key, key), put(cache.value, value))


def _write_rows_in_turn(cache: LayerCache, key: Array, value: Array, start: Array) -> LayerCache:
    """Writes with an operation for each row.

    A TPU would loop over the rows, and carry the whole cache to its vector memory and back for it.
    """
    arrays = list(cache)
    for row in range(len(key)):
        for i, new in enumerate((key, value)):
            place = row, 0, 0, start[row]
            arrays[i] = jax.lax.dynamic_update_slice(arrays[i], new[row : row + 1], place)
    return LayerCache(*arrays)


class WindowCache(NamedTuple):
    """The last keys and values of a sliding-window attention layer, in a ring.

    Position p is in slot p mod S. So a step writes its own positions alone, in place, and what it
    computes depends on the row's own positions, whichever the other rows have reached.

    Attributes:
      key, value: [B, N, H, S], of more slots than the window has positions; those that were never
        filled are zero and are masked by position.
      length: int32 [B], positions seen so far.
    """

    key: Array
    value: Array
    length: Array

    @staticmethod
    def create(
        batch: int, slots: int, num_heads: int, head_dim: int, dtype: DTypeLike
    ) -> "WindowCache":
        """A cache before the first position."""
        shape = batch, num_heads, head_dim, slots
        return WindowCache(
            key=jnp.zeros(shape, dtype),
            value=jnp.zeros(shape, dtype),
            length=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def num_slots(self) -> int:
        """Positions that are kept."""
        return self.key.shape[3]

    @property
    def positions(self) -> Array:
        """The position in each slot, int32 [B, S]; below 0 in slots that are not filled."""
        slots = jnp.arange(self.num_slots, dtype=jnp.int32)[None]
        last = self.length[:, None] - 1
        return last - (last - slots) % self.num_slots

    def extend(self, key: Array, value: Array, window: int) -> "Extended":
        """Appends the next T positions: key and value [B, T, N, H].

        Args:
          window: how many positions each attends to, itself included.
        """
        key, value = (x.transpose(0, 2, 3, 1) for x in (key, value))
        after = self._write(key, value)
        if key.shape[3] <= self.num_slots - window:
            # Read after it was written, the cache is changed in place.
            return Extended(after.key, after.value, after.positions, after)
        new = self.length[:, None] + jnp.arange(key.shape[3], dtype=jnp.int32)[None]
        return Extended(
            jnp.concatenate([self.key, key], axis=3),
            jnp.concatenate([self.value, value], axis=3),
            jnp.concatenate([self.positions, new], axis=1),
            after,
        )

    def restart(self, rows: Array) -> "WindowCache":
        """The cache with the rows [B] that are True before their first position."""
        return self._replace(length=jnp.where(rows, 0, self.length))

    def keep(self, rows: Array, before: "WindowCache") -> "WindowCache":
        """The cache with the rows [B] that are False as they were `before` it was extended.

        What was written to those rows stays: no further position attends to what it replaced, as
        long as no more positions are written at once than there are slots beside the window.
        """
        return self._replace(length=jnp.where(rows, self.length, before.length))

    def _write(self, key: Array, value: Array) -> "WindowCache":
        """Writes over the oldest positions, key and value [B, N, H, T]."""
        batch, length = key.shape[0], key.shape[3]
        kept = min(length, self.num_slots)
        new = jnp.arange(length - kept, length, dtype=jnp.int32)
        slots = (self.length[:, None] + new[None]) % self.num_slots  # [B, kept]
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]

        def write(old: Array, x: Array) -> Array:
            return old.at[rows, :, :, slots].set(x[..., length - kept :].transpose(0, 3, 1, 2))

        return WindowCache(write(self.key, key), write(self.value, value), self.length + length)


class Extended(NamedTuple):
    """A window cache with new positions.

    Attributes:
      key, value: [B, N, H, S], of all positions that the new ones may attend to, in any order.
      positions: int32 [B, S]; below 0 where there is none.
      cache: the cache after them.
    """

    key: Array
    value: Array
    positions: Array
    cache: WindowCache
