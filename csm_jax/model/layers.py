"""The layers that every part of the model is made of.

Axes, here and in the whole package:
  B batch    T query length    S cache length    N query heads    K kv heads
  G query heads per kv head    H head dim    D model dim    F MLP dim
  V vocabulary    C channels    Q codebooks

Weights are stored [out, in]: it is the checkpoints' own orientation, so conversion copies nothing,
and the one in which XLA finds its fast narrow-type products on a CPU.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from csm_jax.config import RopeScaling
from csm_jax.model.precision import Precision, Role

Array = jax.Array
# On the host or on a device; jitted functions take both.
AnyArray = jax.Array | np.ndarray
# A nested dictionary of parameters, by the names of modules and their attributes.
Params = dict[str, Any]
Rngs = nnx.Rngs | None

# Positions of a cache, at most, for which a GPU has forms of its own with few kernels.
SHORT = 64

# What a packed bfloat16 table is held as.
PACKED = jnp.dtype(jnp.uint16)


class Int8Weight(NamedTuple):
    """A matrix as int8 [..., out, in] times a float32 scale per output channel [..., out]."""

    values: Array
    scale: Array


class LowRank(NamedTuple):
    """An update `up @ down` of a matrix [out, in] (LoRA, Hu et al., 2021), scale included."""

    down: AnyArray  # [R, in]
    up: AnyArray  # [out, R]


class Adapted(NamedTuple):
    """A matrix and its update, kept apart so that the matrix needs no gradient of its own."""

    base: AnyArray | Int8Weight
    update: LowRank


Weight = AnyArray | Int8Weight | Adapted


def linear(x: Array, weight: Weight) -> Array:
    """`x @ weight.T`, accumulated in float32: all matrix products with weights go through here.

    Args:
      x: [..., in], any float dtype.
      weight: [out, in].

    Returns:
      [..., out], in the dtype of `x`.
    """
    return linear_float32(x, weight).astype(x.dtype)


def linear_float32(x: Array, weight: Weight) -> Array:
    """Like `linear`, with the float32 accumulator returned unrounded, for logits."""
    if isinstance(weight, Adapted):
        down, up = weight.update
        return linear_float32(x, weight.base) + linear_float32(linear(x, down), up)
    rows = x.reshape(-1, x.shape[-1])  # [M, in]
    if isinstance(weight, Int8Weight):
        product = jax.lax.platform_dependent(
            rows, weight, cuda=_by_widened_weights, default=_by_quantized_rows
        )
    else:
        product = _multiply(rows.astype(weight.dtype), weight, jnp.float32)
    return product.reshape(*x.shape[:-1], -1)


def _by_quantized_rows(rows: Array, weight: Int8Weight) -> Array:
    values, scale = quantize_int8(rows)
    sums = _multiply(values, weight.values, jnp.int32).astype(jnp.float32)
    return sums * scale[:, None] * per_channel(weight.scale, sums)


def _by_widened_weights(rows: Array, weight: Int8Weight) -> Array:
    # A GPU widens weights in the kernel of the product; to quantize rows takes it two kernels more.
    if len(rows) == 1:  # A product of sums, which take the scales in too.
        widened = weight.values.astype(jnp.float32) * weight.scale[:, None]
        return _multiply(rows.astype(jnp.float32), widened, jnp.float32)
    sums = _multiply(rows, weight.values.astype(rows.dtype), jnp.float32)
    return sums * per_channel(weight.scale, sums)


def quantize_int8(x: Array) -> tuple[Array, Array]:
    """Symmetric int8: x [..., D] is about `values * scale[..., None]`, scale float32 [...]."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    # A row of zeros is zeros times anything.
    divisor = jnp.where(scale > 0, scale, 1)[..., None]
    return jnp.round(x / divisor).astype(jnp.int8), scale


def _multiply(rows: Array, weight: AnyArray, accumulator: DTypeLike) -> Array:
    # To a type checker, what `custom_vjp` returns is any object.
    return cast(Array, _product(rows, weight, accumulator))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(rows: Array, weight: Array, accumulator: DTypeLike) -> Array:
    """[M, in] by [out, in] to [M, out], the way that the platform is fast at."""
    plain = functools.partial(_dot, axes=(1, 1), accumulator=accumulator)

    def on_cpu(rows: Array, weight: Array) -> Array:
        count = rows.shape[0]
        if count == 1 and rows.dtype == jnp.float32:
            return plain(rows, weight)
        # The library's fast products are those with the weights on the left; of narrow types,
        # with two columns at least. The barrier keeps XLA from turning the product around again.
        padded = jnp.pad(rows, ((0, max(0, 2 - count)), (0, 0)))
        return jax.lax.optimization_barrier(plain(weight, padded)).T[:count]

    return jax.lax.platform_dependent(rows, weight, cpu=on_cpu, default=plain)


def _product_forward(
    rows: Array, weight: Array, accumulator: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    # With the many rows of training it is as fast either way, and columns slow down what follows.
    return _dot(rows, weight, (1, 1), accumulator), (rows, weight)


def _product_backward(
    accumulator: DTypeLike, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    rows, weight = saved
    # In the type of the forward product: as float32 it would be one of wide types, which takes
    # six times as long on a TPU.
    gradient = gradient.astype(weight.dtype)
    to_rows = _dot(gradient, weight, (1, 0), accumulator)
    to_weight = _dot(gradient, rows, (0, 0), accumulator)
    return to_rows.astype(rows.dtype), to_weight.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


def _dot(left: Array, right: Array, axes: tuple[int, int], accumulator: DTypeLike) -> Array:
    """The product of two matrices over an axis of each."""
    # HIGHEST keeps float32 products in float32 on TPU and GPU, which would round the inputs to
    # bfloat16 or TF32; it does nothing for narrower types.
    return jax.lax.dot_general(
        left,
        right,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulator,
    )


def lookup(table: AnyArray, index: AnyArray) -> Array:
    """`table[index]`, of an embedding or of a stack of matrices, packed (`pack`) or not."""
    rows = table[index]
    return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == PACKED else rows


def pack(table: Array) -> Array:
    """bfloat16 as its bits: XLA:CPU widens all of a bfloat16 table to look up one row of it."""
    return jax.lax.bitcast_convert_type(table.astype(jnp.bfloat16), PACKED)


def per_channel(vector: Array, x: Array) -> Array:
    """A vector [D] in the rank of x [..., D]: broadcasting is spelled out in this package."""
    return jax.lax.expand_dims(vector, range(x.ndim - 1))


def normal(rngs: Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> Array:
    """Initial values of a weight.

    Zeros without `rngs`, where the shape alone is needed: tracing random numbers for every weight
    takes seconds.
    """
    if rngs is None:
        return jnp.zeros(shape, dtype)
    return nnx.initializers.normal(std)(rngs.params(), shape, dtype)


class Linear(nnx.Module):
    """A projection without bias, or a stack of them.

    Attributes:
      weight: [*stack, out, in].
      weight_scale: float32 [*stack, out], if the weight is int8.
      update: a low-rank update that is being trained; it is not a parameter of the model.
    """

    weight: nnx.Param[Array]
    weight_scale: nnx.Param[Array] | None
    update: LowRank | None = None

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        precision: Precision,
        rngs: Rngs,
        stack: tuple[int, ...] = (),
    ):
        shape = (*stack, out_dim, in_dim)
        role = Role.MATRIX_STACK if stack else Role.MATRIX
        values = normal(rngs, shape, in_dim**-0.5, jnp.float32)
        if precision.quantizes(role):
            values, scale = quantize_int8(values)
            self.weight, self.weight_scale = nnx.Param(values), nnx.Param(scale)
        else:
            values = values.astype(precision.weights)
            self.weight = nnx.Param(pack(values) if precision.packs(role) else values)
            self.weight_scale = None

    @property
    def matrix(self) -> Weight:
        """The weight as `linear` takes it."""
        base: Array | Int8Weight = self.weight[...]
        if self.weight_scale is not None:
            base = Int8Weight(self.weight[...], self.weight_scale[...])
        return base if self.update is None else Adapted(base, self.update)

    def __call__(self, x: Array) -> Array:
        return linear(x, self.matrix)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float, *, dtype: DTypeLike):
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

    def __init__(self, dim: int, eps: float, *, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), dtype))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        normed = (centered * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
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


def apply_rope(
    x: Array, positions: Array, frequencies: np.ndarray, limit: int | None = None
) -> Array:
    """Rotates the pairs (i, i + H/2) of every head by `position * frequency`.

    Args:
      x: [B, T, ..., H].
      positions: int32 [B, T], or [1, T] for all rows alike.
      frequencies: float32 [H/2].
      limit: more than any position, if that is known.
    """
    positions = jax.lax.expand_dims(positions, range(2, x.ndim))
    computed = functools.partial(_turns, frequencies=frequencies)
    if limit is None or limit > SHORT:
        cos, sin = computed(positions)
    else:
        # A GPU computes sines in a kernel of their own, and looks them up in the one that follows.
        table = functools.partial(_turns_from_table, frequencies=frequencies, limit=limit)
        cos, sin = jax.lax.platform_dependent(positions, cuda=table, default=computed)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [left * cos - right * sin, right * cos + left * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _turns(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
    """Cosine and sine of `position * frequency`, of positions [B, T, ..., 1]: [B, T, ..., H/2]."""
    # Angles reach 2048 radians: bfloat16 would not even resolve a whole turn.
    positions = positions.astype(jnp.float32)
    angles = positions * per_channel(jnp.asarray(frequencies), positions)
    return jnp.cos(angles), jnp.sin(angles)


def _turns_from_table(positions: Array, frequencies: np.ndarray, limit: int) -> tuple[Array, Array]:
    """Like `_turns`, of positions below `limit`."""
    angles = np.arange(limit, dtype=np.float32)[:, None] * frequencies
    cos, sin = jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
    return cos[positions[..., 0]], sin[positions[..., 0]]


def attention(query: Array, key: Array, value: Array, visible: Array) -> tuple[Array, Array]:
    """Grouped-query attention with an explicit mask.

    Args:
      query: [B, T, K, G, H].
      key, value: [B, K, H, S].
      visible: bool [B, T, S], the keys that each query attends to; or [1, T, S].

    Returns:
      [B, T, K, G, H]; and the weights of the values, float32 [B, K, G, T, S].
    """
    by_products = functools.partial(_attention_by_products, visible=visible)
    is_long = key.shape[3] > SHORT
    if query.shape[1] > 1 or (is_long and len(query) > 1):
        return by_products(query, key, value)
    # A GPU starts two kernels for the products and two to four for what is between them; of sums it
    # makes one kernel of everything, or three where the cache is long. Sums read keys and values
    # once for each query head, which costs more than it saves if there are many of them.
    by_sums = functools.partial(_attention_by_sums, visible=visible)
    return jax.lax.platform_dependent(query, key, value, cuda=by_sums, default=by_products)


def _attention_by_products(
    query: Array, key: Array, value: Array, visible: Array
) -> tuple[Array, Array]:
    weights = _attention_weights(_scores(query, key), query, visible)
    mixed = jnp.einsum(
        "BKGTS,BKHS->BTKGH",
        weights.astype(value.dtype),
        value,
        precision=jax.lax.Precision.HIGHEST,
    )
    return mixed, weights


def _attention_by_sums(
    query: Array, key: Array, value: Array, visible: Array
) -> tuple[Array, Array]:
    """Attention of one position, T = 1."""
    queries = query[:, 0, ..., None].astype(jnp.float32)  # [B, K, G, H, 1]
    scores = jnp.sum(queries * key[:, :, None].astype(jnp.float32), axis=3)  # [B, K, G, S]
    weights = _attention_weights(scores[:, :, :, None], query, visible)
    rounded = weights.astype(value.dtype)  # [B, K, G, 1, S]
    products = rounded.astype(jnp.float32) * value[:, :, None].astype(jnp.float32)
    mixed = jnp.sum(products, axis=4).astype(value.dtype)  # [B, K, G, H]
    return mixed[:, None], weights


def _attention_weights(scores: Array, query: Array, visible: Array) -> Array:
    """The softmax of products [B, K, G, T, S] of queries and keys."""
    # It runs in float32, from float32 scores: bfloat16 has 8 bits for what may be hundreds of
    # nearly equal weights.
    scaled = scores * query.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(visible[:, None, None], scaled, -jnp.inf), axis=-1)


def _scores(query: Array, key: Array) -> Array:
    """Products of queries [B, T, K, G, H] and keys [B, K, H, S], float32 [B, K, G, T, S]."""
    product = functools.partial(
        jnp.einsum,
        "BTKGH,BKHS->BKGTS",
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )

    def widened(query: Array, key: Array) -> Array:
        return product(query.astype(jnp.float32), key.astype(jnp.float32))

    # XLA:CPU has no batched product of two bfloat16 that gives float32.
    return jax.lax.platform_dependent(query, key, cpu=widened, default=product)
