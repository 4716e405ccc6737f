"""The Llama stack (Llama 3.2): backbone and depth decoder are two sizes of it."""

import jax
import jax.numpy as jnp
from flax import nnx

from csm_jax import cache as kv
from csm_jax.cache import KVCache, LayerCache
from csm_jax.config import LlamaConfig
from csm_jax.layers import Linear, RMSNorm, apply_rope, attention, rope_frequencies

Array = jax.Array


class Attention(nnx.Module):
    """Causal grouped-query self-attention over a preallocated cache."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        query_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.q = Linear(config.embed_dim, query_dim, dtype=dtype, rngs=rngs)
        self.k = Linear(config.embed_dim, kv_dim, dtype=dtype, rngs=rngs)
        self.v = Linear(config.embed_dim, kv_dim, dtype=dtype, rngs=rngs)
        self.o = Linear(query_dim, config.embed_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, cache: LayerCache, positions: Array) -> tuple[Array, LayerCache]:
        """x: [B, T, D]; positions: int32 [B, T], consecutive in each row."""
        config = self.config
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        query = self._heads(self.q(x), config.num_heads)  # [B, T, N, H]
        key = self._heads(self.k(x), config.num_kv_heads)  # [B, T, K, H]
        value = self._heads(self.v(x), config.num_kv_heads)
        query = apply_rope(query, positions, frequencies)
        key = apply_rope(key, positions, frequencies)
        cache = kv.write(cache, key, value, start=positions[:, 0])
        slots = jnp.arange(cache.key.shape[1], dtype=jnp.int32)
        visible = slots[None, None, :] <= positions[:, :, None]  # [B, T, S]
        mixed = attention(query, cache.key, cache.value, visible)
        return self.o(mixed.reshape(*x.shape[:2], -1)), cache

    def _heads(self, x: Array, num_heads: int) -> Array:
        return x.reshape(*x.shape[:2], num_heads, self.config.head_dim)


class MLP(nnx.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate = Linear(config.embed_dim, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.up = Linear(config.embed_dim, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.down = Linear(config.mlp_dim, config.embed_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, cache: LayerCache, positions: Array) -> tuple[Array, LayerCache]:
        mixed, cache = self.attn(self.attn_norm(x), cache, positions)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """A stack of blocks and the final norm. Embeddings and heads belong to the caller."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        # Unrolled, not scanned: a scan over stacked layers copies every weight on a CPU.
        self.layers = nnx.List(
            [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)

    def __call__(self, x: Array, cache: KVCache) -> tuple[Array, KVCache]:
        """Appends T positions to every row.

        Args:
          x: [B, T, D] embedded inputs.
          cache: row b continues at position `cache.lengths[b]`. Keys beyond a row's length are
            never read before they are written again, so a right-padded prompt may leave
            anything there.

        Returns:
          Hidden states [B, T, D] after the final norm, and the cache with lengths grown by T.
        """
        length = x.shape[1]
        offsets = jnp.arange(length, dtype=jnp.int32)
        positions = cache.lengths[:, None] + offsets[None, :]
        layers = []
        for block, layer_cache in zip(self.layers, cache.layers, strict=True):
            x, layer_cache = block(x, layer_cache, positions)
            layers.append(layer_cache)
        return self.norm(x), KVCache(tuple(layers), cache.lengths + length)
