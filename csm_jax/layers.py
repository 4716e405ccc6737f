"""The layers that every part of the model is made of.

Axes, here and in the whole package:
  B batch    T query length    S cache length    N query heads    K kv heads
  G query heads per kv head    H head dim    D model dim    F MLP dim
  V vocabulary    C channels    Q codebooks

Weights are stored [out, in]: it is the checkpoints' own orientation, so conversion copies nothing,
and the one in which XLA finds its fast narrow-type products on a CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from csm_jax.config import RopeScaling

Array = jax.Array


def linear(x: Array, weight: Array) -> Array:
    """`x @ weight.T`, accumulated in float32: the only matrix product with weights there is.

    Args:
      x: [..., in], any float dtype.
      weight: [out, in], same dtype.

    Returns:
      [..., out], in the dtype of `x`.
    """
    return linear_float32(x, weight).astype(x.dtype)


def linear_float32(x: Array, weight: Array) -> Array:
    """Like `linear`, with the float32 accumulator returned unrounded, as sampling wants logits."""
    # HIGHEST keeps float32 products in float32 on TPU and GPU, which would round the inputs to
    # bfloat16 or TF32; it does nothing for narrower types.
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def per_channel(vector: Array, x: Array) -> Array:
    """A vector [D] in the rank of x [..., D]: broadcasting is spelled out in this package."""
    return jax.lax.expand_dims(vector, range(x.ndim - 1))


class Linear(nnx.Module):
    """A projection without bias. Weight [out, in]."""

    def __init__(self, in_dim: int, out_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(in_dim**-0.5)
        self.weight = nnx.Param(init(rngs.params(), (out_dim, in_dim), dtype))

    def __call__(self, x: Array) -> Array:
        return linear(x, self.weight[...])


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float, *, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype))

    def __call__(self, x: Array) -> Array:
        # Squares of bfloat16 activations lose the mean; and the references round to the working
        # type before the scale is applied, which parity in bfloat16 needs.
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return normed.astype(x.dtype) * per_channel(self.scale[...], x)


class LayerNorm(nnx.Module):
    """Layer norm with bias (Ba et al., 2016), in float32."""

    def __init__(self, dim: int, eps: float, *, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), dtype))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = (centred * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normed * per_channel(self.scale[...], x) + per_channel(self.bias[...], x)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angular frequency of each rotated pair, float32 [H/2], with Llama-3 scaling if given.

    Wavelengths beyond `original_max_seq_len / low_freq_factor` are stretched by `factor`, those
    under `original_max_seq_len / high_freq_factor` are kept, those between are interpolated
    (Llama 3.1 release; torchtune `Llama3ScaledRoPE`).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequencies = (1.0 / theta**exponents).astype(np.float32)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_seq_len * frequencies / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return (kept * frequencies + (1 - kept) * frequencies / scaling.factor).astype(np.float32)


def apply_rope(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """Rotates the pairs (i, i + H/2) of every head by `position * frequency`.

    Args:
      x: [B, T, heads, H].
      positions: int32 [B, T].
      frequencies: float32 [H/2].
    """
    # Angles reach 2048 radians: bfloat16 would not even resolve a whole turn.
    positions = positions[..., None, None].astype(jnp.float32)
    angles = positions * per_channel(jnp.asarray(frequencies), positions)  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attention(query: Array, key: Array, value: Array, visible: Array) -> Array:
    """Grouped-query attention with an explicit mask.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H], where K divides N.
      visible: bool [B, T, S], which keys each query may see.

    Returns:
      [B, T, N, H].
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    highest = jax.lax.Precision.HIGHEST
    # The softmax runs in float32, from float32 scores: bfloat16 has 8 bits for what may be
    # hundreds of nearly equal weights.
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        grouped,
        key,
        precision=highest,
        preferred_element_type=jnp.float32,
    )
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value, precision=highest)
    return mixed.reshape(query.shape)
