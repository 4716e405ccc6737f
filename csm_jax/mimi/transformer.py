"""The codec's two transformers, between the convolutions and the quantizer, at 25 Hz.

Sizes and order of operations: kyutai-labs/moshi `modules/transformer.py` and `models/loaders.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from csm_jax.config import MimiConfig
from csm_jax.mimi.conv import Array, Chain, StreamingLayer
from csm_jax.model.kv_cache import WindowCache
from csm_jax.model.layers import (
    LayerNorm,
    Linear,
    Rngs,
    apply_rope,
    attention,
    per_channel,
    rope_frequencies,
)
from csm_jax.model.precision import FLOAT32

# The initial scale of residual branches (moshi `loaders.py`).
LAYER_SCALE = 0.01


class TransformerLayer(StreamingLayer):
    """Attention over the last `attention_window` positions, then an MLP; both scaled per channel.

    Layer norm comes first (pre-norm), projections have no biases, and each branch is multiplied
    by a learned vector (LayerScale, Touvron et al., 2021).
    """

    def __init__(self, config: MimiConfig, *, rngs: Rngs):
        dim = config.embed_dim
        self.config = config
        self.attn_norm = LayerNorm(dim, config.norm_eps, dtype=jnp.float32)
        self.q = Linear(dim, dim, precision=FLOAT32, rngs=rngs)
        self.k = Linear(dim, dim, precision=FLOAT32, rngs=rngs)
        self.v = Linear(dim, dim, precision=FLOAT32, rngs=rngs)
        self.o = Linear(dim, dim, precision=FLOAT32, rngs=rngs)
        self.attn_scale = nnx.Param(jnp.full((dim,), LAYER_SCALE, jnp.float32))
        self.mlp_norm = LayerNorm(dim, config.norm_eps, dtype=jnp.float32)
        self.up = Linear(dim, config.mlp_dim, precision=FLOAT32, rngs=rngs)
        self.down = Linear(config.mlp_dim, dim, precision=FLOAT32, rngs=rngs)
        self.mlp_scale = nnx.Param(jnp.full((dim,), LAYER_SCALE, jnp.float32))

    def init_state(self, batch: int) -> WindowCache:
        config = self.config
        return WindowCache.create(
            batch, config.attention_window, config.num_heads, config.head_dim, jnp.float32
        )

    def step(self, x: Array, state: WindowCache) -> tuple[Array, WindowCache]:
        mixed, state = self._attend(self.attn_norm(x), state)
        x = x + mixed * per_channel(self.attn_scale[...], x)
        hidden = jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False)
        return x + self.down(hidden) * per_channel(self.mlp_scale[...], x), state

    def _attend(self, x: Array, cache: WindowCache) -> tuple[Array, WindowCache]:
        batch, length, dim = x.shape
        window = self.config.attention_window
        heads = (batch, length, self.config.num_heads, self.config.head_dim)
        frequencies = rope_frequencies(self.config.head_dim, self.config.rope_theta)
        positions = cache.length[:, None] + jnp.arange(length, dtype=jnp.int32)[None]  # [B, T]

        query = apply_rope(self.q(x).reshape(heads), positions, frequencies)
        key = apply_rope(self.k(x).reshape(heads), positions, frequencies)
        value = self.v(x).reshape(heads)
        key = jnp.concatenate([cache.key, key.transpose(0, 2, 3, 1)], axis=3)  # [B, N, H, W + T]
        value = jnp.concatenate([cache.value, value.transpose(0, 2, 1, 3)], axis=2)

        # Every query head has its own keys: groups of one.
        visible = _visible(cache.length, length, window)
        mixed, _ = attention(query[..., None, :], key, value, visible)
        cache = WindowCache(key[..., -window:], value[:, :, -window:], cache.length + length)
        return self.o(mixed.reshape(batch, length, dim)), cache


class Transformer(Chain):
    """A stack of `TransformerLayer`, [B, T, D] to [B, T, D], without a norm at its end."""

    def __init__(self, config: MimiConfig, *, rngs: Rngs):
        super().__init__(TransformerLayer(config, rngs=rngs) for _ in range(config.num_layers))


def _visible(seen: Array, length: int, window: int) -> Array:
    """The mask of new queries over cached and new keys, bool [B, T, W + T].

    Args:
      seen: int32 [B], positions before this block; the cache ends with the last of them.
    """
    query = seen[:, None, None] + jnp.arange(length, dtype=jnp.int32)[None, :, None]
    offsets = jnp.arange(window + length, dtype=jnp.int32)[None, None]
    key = seen[:, None, None] - window + offsets
    return (key >= 0) & (key <= query) & (key > query - window)
