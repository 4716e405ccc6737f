"""Convolutions of 3 x 3 with half of the multiplications, for the stream of marks.

Winograd's minimal filtering F(4, 3), along the bins of the spectrum: 4 outputs of 3 taps by 6
products instead of 12 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016).
With products of float32 the rounding error is some 1e-6 of the largest output; with those of
bfloat16, which take half of the time where the processor has them, some 1e-2.

The bins are held apart by their place in a tile, so that all sums are of whole arrays; what was
computed of the last two frames is kept for the next call.

Axes: T frames, F bins of the spectrum, C channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

_TILE = 4
_TAP_COUNT = 3
# Where the polynomials of inputs and taps are multiplied, beside infinity. Of all, these make the
# rounding errors almost the smallest: 2/3 of those with 0, 1, -1, 2 and -2.
_POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)


def _powers(count: int) -> np.ndarray:
    """The powers of the points, and of infinity, [6, count]."""
    finite = np.vander(_POINTS, count, increasing=True)
    return np.vstack([finite, np.eye(count)[-1]])


# Of taps to products, of products to outputs, and of inputs to products.
_TAPS = _powers(_TAP_COUNT)
_OUTPUTS = _powers(_TILE).T
_INPUTS = np.linalg.inv(_powers(_TILE + _TAP_COUNT - 1)).T.round(12)


def num_tiles(bins: int) -> int:
    return -(-bins // _TILE)


def split_bins(x: jax.Array) -> list[jax.Array]:
    """Bins [T, F, C] -> arrays [T, tiles, C]: of each tile the first bin, the second, ..."""
    count, bins, channels = x.shape
    tiles = num_tiles(bins)
    padded = jnp.pad(x, ((0, 0), (0, _TILE * tiles - bins), (0, 0)))
    padded = padded.reshape(count, tiles, _TILE, channels)
    return [padded[:, :, place] for place in range(_TILE)]


def join_bins(places: Sequence[jax.Array], bins: int) -> jax.Array:
    """The inverse of `split_bins`, [T, F, C]."""
    count, tiles, channels = places[0].shape
    return jnp.stack(places, axis=2).reshape(count, _TILE * tiles, channels)[:, :bins]


def bins_exist(bins: int) -> list[np.ndarray]:
    """Which bins of the tiles there are, for each array of `split_bins`, bool [tiles, 1]."""
    exist = np.arange(_TILE * num_tiles(bins)) < bins
    return list(exist.reshape(-1, _TILE, 1).swapaxes(0, 1))


def transform_kernel(kernel: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
    """The kernel of a convolution, [3, 3, C, C'] -> one for each product, [3 C, C']."""
    times, _, inputs, outputs = kernel.shape
    taps = np.einsum("pf,tfco->ptco", _TAPS, np.asarray(kernel, np.float64))
    return [jnp.asarray(tap, dtype) for tap in taps.reshape(-1, times * inputs, outputs)]


def empty_frames(bins: int, kernel: Sequence[jax.Array]) -> list[np.ndarray]:
    """What `convolve` with this kernel keeps where no frames came before."""
    return [
        np.zeros(
            (_TAP_COUNT - 1, num_tiles(bins), len(taps) // _TAP_COUNT), f"u{taps.dtype.itemsize}"
        )
        for taps in kernel
    ]


def convolve(
    places: Sequence[jax.Array], kept: Sequence[jax.Array], kernel: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Convolves T frames, with the two before them, and with zeros below and above their bins.

    Args:
      places: the bins as `split_bins` gives them, float32 [T, tiles, C].
      kept: of the two frames before, as the last call has given it.
      kernel: as `transform_kernel` gives it; the products are of its type, their sums float32.

    Returns:
      The convolved bins, whose first frame is that before the first of `places`, float32
      [T, tiles, C'], and what is to be kept.
    """
    # What comes before is computed once, and not in each product.
    places = lax.optimization_barrier(tuple(places))
    count = len(places[0])
    taken = [_next_tile(places[-1], -1), *places, _next_tile(places[0], 1)]
    products, recent = [], []
    for weights, earlier, taps in zip(_INPUTS, kept, kernel, strict=True):
        tile = _combine(weights, taken).astype(taps.dtype)
        # As integers, since XLA joins bfloat16 on CPUs by way of float32.
        frames = jnp.concatenate([earlier, tile.view(earlier.dtype)])
        rows = jnp.concatenate([frames[time : time + count] for time in range(_TAP_COUNT)], axis=-1)
        rows = rows.view(taps.dtype).reshape(-1, len(taps))
        product = jnp.matmul(
            rows, taps, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        products.append(product.reshape(*tile.shape[:2], -1))
        recent.append(frames[1 - _TAP_COUNT :])
    return [_combine(row, products) for row in _OUTPUTS], recent


def _next_tile(place: jax.Array, step: int) -> jax.Array:
    """Of each tile what the one before (-1) or after it (1) has, or zero, [T, tiles, C]."""
    padded = jnp.pad(place, ((0, 0), (1, 1), (0, 0)))
    return padded[:, 1 + step : 1 + step + place.shape[1]]


def _combine(weights: Sequence[float], arrays: Sequence[jax.Array]) -> jax.Array:
    """A weighted sum, without the terms of weight 0."""
    terms = zip(weights, arrays, strict=True)
    first, *others = [float(weight) * array for weight, array in terms if weight]
    return sum(others, first)
