"""Convolutions of 3 x 3 with half of the multiplications, for the stream of marks.

Winograd's minimal filtering F(4, 3), along the bins of the spectrum: 4 outputs of 3 taps by 6
products instead of 12 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016).
The rounding error is some 1e-6 of the largest output.

Axes: T frames, F bins of the spectrum, C channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_TILE = 4
# Of inputs to products, of taps to products, and of products to outputs.
_INPUTS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_TAPS = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_OUTPUTS = np.array(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)


def transform_kernel(kernel: jax.Array) -> jax.Array:
    """The kernel of a convolution, [time, 3, C, C'] -> what `convolve` takes, [6, time * C, C']."""
    times, _, inputs, outputs = kernel.shape
    taps = np.einsum("pf,tfco->ptco", _TAPS, np.asarray(kernel, np.float64))
    return jnp.asarray(taps.reshape(len(_TAPS), times * inputs, outputs), jnp.float32)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves [T + 2, F, C] -> [T, F, C'], with a zero beyond the first and the last bin."""
    count, bins, channels = len(x) - 2, x.shape[1], x.shape[2]
    tiles = -(-bins // _TILE)
    padded = jnp.pad(x, ((0, 0), (1, _TILE * tiles + 5 - bins), (0, 0)))
    taken = [padded[:, first : first + _TILE * tiles : _TILE] for first in range(len(_TAPS))]

    def product(index: int) -> jax.Array:
        tile = _combine(_INPUTS[index], taken)
        rows = jnp.concatenate([tile[time : time + count] for time in range(3)], axis=-1)
        rows = rows.reshape(count * tiles, 3 * channels)
        return jnp.matmul(rows, kernel[index], precision=lax.Precision.HIGHEST)

    products = [product(index) for index in range(len(_TAPS))]
    outputs = jnp.stack([_combine(row, products) for row in _OUTPUTS], axis=1)
    return outputs.reshape(count, _TILE * tiles, -1)[:, :bins]


def _combine(weights: Sequence[float], arrays: Sequence[jax.Array]) -> jax.Array:
    """A weighted sum, without the terms of weight 0."""
    terms = zip(weights, arrays, strict=True)
    first, *others = [float(weight) * array for weight, array in terms if weight]
    return sum(others, first)
