"""Products of normed activations: the form of a GPU against numpy and against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.model.layers import Int8Weight, RMSNorm, linear_float32, quantize_int8
from csm_jax.model.normed_products import _folded, normed_products

DIM, OUT, EPS = 24, 10, 1e-5
folded = jax.jit(_folded, static_argnames="eps")


def arrays(dtype: str) -> list[jax.Array]:
    """A row, a scale and two matrices."""
    rng = np.random.default_rng(0)
    shapes = (1, 1, DIM), (DIM,), (OUT, DIM), (OUT, DIM)
    return [jnp.asarray(rng.normal(scale=3, size=shape), dtype) for shape in shapes]


def expected(row, scale, matrix) -> np.ndarray:
    """The definition, in float64."""
    row, scale, matrix = (
        np.asarray(x.astype(jnp.float32), np.float64) for x in (row, scale, matrix)
    )
    return (row / np.sqrt(np.mean(row**2) + EPS) * scale) @ matrix.T


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_the_form_of_a_gpu_equals_the_definition(dtype, rtol):
    row, scale, *matrices = arrays(dtype)
    for got, matrix in zip(folded(row, scale, tuple(matrices), eps=EPS), matrices, strict=True):
        wanted = expected(row, scale, matrix)
        assert got.shape == (1, 1, OUT)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, atol=rtol * np.abs(wanted).max())


def test_the_form_of_a_gpu_of_int8_weights_equals_the_product_with_their_values():
    row, scale, matrix, _ = arrays("float32")
    weight = Int8Weight(*quantize_int8(matrix))
    (got,) = folded(row, scale, (weight,), eps=EPS)
    wanted = expected(row, scale, weight.values.astype(jnp.float32) * weight.scale[:, None])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_elsewhere_products_are_those_of_the_norm():
    row, scale, *matrices = arrays("float32")
    norm = RMSNorm(DIM, EPS, dtype="float32")
    norm.scale[...] = scale
    for x in (row, jnp.concatenate([row, 2 * row])):
        got = jax.jit(lambda x: normed_products(norm, x, *matrices))(x)
        wanted = jax.jit(lambda x: [linear_float32(norm(x), matrix) for matrix in matrices])(x)
        np.testing.assert_array_equal(got, wanted)
