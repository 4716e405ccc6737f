"""Products of normed activations with matrices, the first half of each half of a block."""

import operator

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.model.layers import (
    Adapted,
    AnyArray,
    Array,
    Int8Weight,
    RMSNorm,
    Weight,
    linear_float32,
)


def normed_products(norm: RMSNorm, x: Array, *weights: Weight) -> tuple[Array, ...]:
    """`linear_float32(norm(x), weight)` for each of some matrices.

    A GPU's time for one row is that of its launches, so it has another form for that: the root mean
    square, one number, divides the products instead of the row.

    Args:
      x: [B, T, D].
      weights: [out, D] each, of one shape.

    Returns:
      float32 [B, T, out] each.
    """

    def in_turn(x: Array, *weights: Weight) -> tuple[Array, ...]:
        normed = norm(x)
        return tuple(linear_float32(normed, weight) for weight in weights)

    def folded(x: Array, *weights: AnyArray | Int8Weight) -> tuple[Array, ...]:
        return _folded(x, norm.scale[...], weights, norm.eps)

    is_adapted = any(isinstance(weight, Adapted) for weight in weights)
    # In float16 what has not been normed yet overflows.
    if x.size > x.shape[-1] or is_adapted or x.dtype == jnp.float16:
        return in_turn(x, *weights)
    return jax.lax.platform_dependent(x, *weights, cuda=folded, default=in_turn)


def _folded(
    x: Array, scale: Array, weights: tuple[AnyArray | Int8Weight, ...], eps: float
) -> tuple[Array, ...]:
    """The products of one row, [1, 1, D], all in one reduction, which is one kernel.

    For that the squares are summed again for each entry of the products.
    """
    row = x.reshape(-1).astype(jnp.float32)
    # Rounded as the norm is, which is what a product of several rows reads.
    scaled = (row * scale.astype(jnp.float32)).astype(x.dtype).astype(jnp.float32)
    matrices = [weight.values if isinstance(weight, Int8Weight) else weight for weight in weights]
    terms = [jnp.asarray(matrix).astype(jnp.float32) * scaled[None] for matrix in matrices]
    squares = jnp.broadcast_to(jnp.square(row)[None], terms[0].shape)
    *sums, sum_of_squares = jax.lax.reduce(
        [*terms, squares],
        [np.float32(0)] * (len(terms) + 1),
        lambda left, right: list(map(operator.add, left, right)),
        dimensions=(1,),
    )
    inverse = jax.lax.rsqrt(sum_of_squares / len(row) + eps)  # [out], all equal
    products = [
        total * inverse * weight.scale if isinstance(weight, Int8Weight) else total * inverse
        for total, weight in zip(sums, weights, strict=True)
    ]
    return tuple(product[None, None] for product in products)
