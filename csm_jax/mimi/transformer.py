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
    per_channel,
    rope_frequencies,
)
from csm_jax.model.precision import FLOAT32

# The initial scale of residual branches (moshi `loaders.py`).
LAYER_SCALE = 0.01
# Frames of a block, at most, whose keys and values are written in place.
MAX_STREAM_FRAMES = 8


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
        num_slots = config.attention_window + MAX_STREAM_FRAMES * config.downsample_stride
        return WindowCache.create(batch, num_slots, config.num_heads, config.head_dim, jnp.float32)

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

        key, value, seen, cache = cache.extend(key, value, window)
        scores = _product("BTNH,BNHS->BNTS", query, key) * self.config.head_dim**-0.5
        visible = _visible(positions, seen, window)
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
        mixed = _product("BNTS,BNHS->BTNH", weights, value)
        return self.o(mixed.reshape(batch, length, dim)), cache


class Transformer(Chain):
    """A stack of `TransformerLayer`, [B, T, D] to [B, T, D], without a norm at its end."""

    def __init__(self, config: MimiConfig, *, rngs: Rngs):
        super().__init__(TransformerLayer(config, rngs=rngs) for _ in range(config.num_layers))


def _visible(query: Array, key: Array, window: int) -> Array:
    """Which keys at positions [B, S] the queries at [B, T] attend to, bool [B, T, S]."""
    query, key = query[:, :, None], key[:, None]
    return (key >= 0) & (key <= query) & (key > query - window)


def _product(axes: str, left: Array, right: Array) -> Array:
    return jnp.einsum(axes, left, right, precision=jax.lax.Precision.HIGHEST)
