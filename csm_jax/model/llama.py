"""The Llama stack (Llama 3.2): backbone and depth decoder are two sizes of it."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from csm_jax.config import LlamaConfig
from csm_jax.model import kv_cache as kv
from csm_jax.model.changes import NO_STACK_CHANGES, ReplacedHeads, StackChanges, replace_heads
from csm_jax.model.kv_cache import KVCache, LayerCache
from csm_jax.model.layers import (
    AnyArray,
    Array,
    Linear,
    RMSNorm,
    Rngs,
    apply_rope,
    attention,
    rope_frequencies,
)
from csm_jax.model.normed_products import normed_products
from csm_jax.model.precision import Precision

# An attention head of a stack: its layer, and its number among the layer's query heads.
Head = tuple[int, int]


class Observed(NamedTuple):
    """What was asked for of a pass through a stack, beside its outputs.

    Attributes:
      attention: of the chosen heads, from each new position to each position of the cache,
        float32 [B, heads, T, S].
      states: of the chosen layers, each [B, T, D].
    """

    attention: AnyArray
    states: tuple[Array, ...]


class Attention(nnx.Module):
    """Causal grouped-query self-attention over a preallocated cache.

    Queries, keys and values are one product, with the rows of `qkv.py`. A mesh can then split it by
    kv heads.
    """

    def __init__(self, config: LlamaConfig, *, precision: Precision, rngs: Rngs):
        self.config = config
        query_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        qkv_dim = query_dim + 2 * kv_dim
        self.qkv = Linear(config.embed_dim, qkv_dim, precision=precision, rngs=rngs)
        self.o = Linear(query_dim, config.embed_dim, precision=precision, rngs=rngs)

    def __call__(
        self,
        x: Array,
        norm: RMSNorm,
        cache: LayerCache,
        positions: Array,
        kv_length: int,
        replaced: ReplacedHeads | None = None,
    ) -> tuple[Array, LayerCache, Array]:
        """Attends to the cache, after the new positions have been written to it.

        Args:
          x: [B, T, D].
          norm: of `x`.
          positions: int32 [B, T] or [1, T], consecutive in each row.
          kv_length: as for `Llama.__call__`.
          replaced: heads whose outputs are replaced.

        Returns:
          [B, T, D]; the cache with the new positions; and how much the queries attend to each
          position of it, float32 [B, K, G, T, S].
        """
        config = self.config
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        (product,) = normed_products(norm, x, self.qkv.matrix)
        heads = product.astype(x.dtype)
        heads = heads.reshape(*x.shape[:2], config.num_kv_heads, -1, config.head_dim)
        limit = cache.key.shape[3]
        rotated = apply_rope(heads[..., :-1, :], positions, frequencies, limit)
        query, key, value = rotated[..., :-1, :], rotated[..., -1, :], heads[..., -1, :]
        key, value = (x.transpose(0, 2, 3, 1) for x in (key, value))
        cache = kv.write(cache, key, value, start=positions[:, 0])
        slots = jnp.arange(kv_length, dtype=jnp.int32)
        visible = slots[None, None, :] <= positions[:, :, None]  # [B, T, S]
        mixed, weights = attention(
            query, cache.key[..., :kv_length], cache.value[..., :kv_length], visible
        )
        mixed = replace_heads(mixed, replaced)
        return self.o(mixed.reshape(*x.shape[:2], -1)), cache, weights


class MLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LlamaConfig, *, precision: Precision, rngs: Rngs):
        self.gate = Linear(config.embed_dim, config.mlp_dim, precision=precision, rngs=rngs)
        self.up = Linear(config.embed_dim, config.mlp_dim, precision=precision, rngs=rngs)
        self.down = Linear(config.mlp_dim, config.embed_dim, precision=precision, rngs=rngs)

    def __call__(self, x: Array, norm: RMSNorm) -> Array:
        """Maps x [B, T, D], of which it takes the norm, to the same."""
        products = normed_products(norm, x, self.gate.matrix, self.up.matrix)
        gate, up = (product.astype(x.dtype) for product in products)
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: LlamaConfig, *, precision: Precision, rngs: Rngs):
        self.attn_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=precision.activations)
        self.attn = Attention(config, precision=precision, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=precision.activations)
        self.mlp = MLP(config, precision=precision, rngs=rngs)

    def __call__(
        self,
        x: Array,
        cache: LayerCache,
        positions: Array,
        kv_length: int,
        replaced: ReplacedHeads | None = None,
    ) -> tuple[Array, LayerCache, Array]:
        """Maps [B, T, D] to the same, with the cache and the weights of `Attention`."""
        mixed, cache, weights = self.attn(x, self.attn_norm, cache, positions, kv_length, replaced)
        x = x + mixed
        return x + self.mlp(x, self.mlp_norm), cache, weights


class Llama(nnx.Module):
    """A stack of blocks and the final norm. Embeddings and heads belong to the caller."""

    def __init__(self, config: LlamaConfig, *, precision: Precision, rngs: Rngs):
        # Unrolled, not scanned: a scan over stacked layers copies every weight on a CPU.
        self.layers = nnx.List(
            [Block(config, precision=precision, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=precision.activations)

    def __call__(
        self, x: Array, cache: KVCache, kv_length: int | None = None, remat: bool = False
    ) -> tuple[Array, KVCache]:
        """Appends T positions to every row.

        Args:
          x: [B, T, D] embedded inputs.
          cache: row b continues at position `cache.lengths[b]`. Keys beyond a row's length are
            never read before they are written again, so a right-padded prompt may leave
            anything there.
          kv_length: positions of the cache that attention reads; after the call no row may hold
            more. None reads them all.
          remat: for a gradient, compute each block again instead of keeping what is inside it.

        Returns:
          Hidden states [B, T, D] after the final norm, and the cache with lengths grown by T.
        """
        states, cache, _ = self.attend(x, cache, kv_length, remat=remat)
        return states, cache

    def attend(
        self,
        x: Array,
        cache: KVCache,
        kv_length: int | None = None,
        heads: Sequence[Head] = (),
        layers: Sequence[int] = (),
        remat: bool = False,
        changes: StackChanges = NO_STACK_CHANGES,
        final_norm: bool = True,
    ) -> tuple[Array, KVCache, Observed]:
        """Like calling the stack, and returns the attention of some heads and some states too.

        No computation depends on what is not asked for.

        Args:
          heads: whose attention is returned.
          layers: whose states are returned, numbered as in transformers: 0 is `x`, i is what
            layer i passes on, counted from 1; of the last one it is taken after the final norm.
          changes: what is changed at the new positions.
          final_norm: False leaves it to the caller.

        Returns:
          Hidden states and cache; and what was asked for.
        """
        length = x.shape[1]
        kv_length = kv_length or cache.layers[0].value.shape[3]
        offsets = jnp.arange(length, dtype=jnp.int32)
        positions = cache.lengths[:, None] + offsets[None, :]
        caches, weights, states = [], [], [x]
        added, replaced = changes.added or {}, changes.heads or {}
        for index, (block, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            call = functools.partial(block, kv_length=kv_length, replaced=replaced.get(index))
            call = jax.checkpoint(call) if remat else call
            x, layer_cache, attention_weights = call(x, layer_cache, positions)
            if index + 1 in added:
                x = x + jnp.asarray(added[index + 1])[:, None].astype(x.dtype)
            caches.append(layer_cache)
            weights.append(attention_weights)
            states.append(x)
        states[-1] = self.norm(x) if final_norm else x
        groups = weights[0].shape[2]
        chosen = [weights[layer][:, head // groups, head % groups] for layer, head in heads]
        # Of numpy, so that without heads the program has no operation for it.
        nothing = np.zeros((len(x), 0, length, kv_length), np.float32)
        attended = jnp.stack(chosen, axis=1) if chosen else nothing
        observed = Observed(attended, tuple(states[layer] for layer in layers))
        return states[-1], KVCache(tuple(caches), cache.lengths + length), observed
