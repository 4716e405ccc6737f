"""The fast convolution is the convolution."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate

from csm_jax.watermark import winograd


def _convolve(x, kernel, dtype, sizes):
    """The frames [T, F, C] in parts of these sizes, and a frame of zeros after them."""
    transformed = winograd.transform_kernel(kernel, dtype)
    kept = winograd.empty_frames(x.shape[1], transformed)
    parts = np.split(np.pad(x, ((0, 1), (0, 0), (0, 0))), np.cumsum(sizes))
    convolved = []
    for part in parts:
        places, kept = winograd.convolve(winograd.split_bins(part), kept, transformed)
        convolved.append(winograd.join_bins(places, x.shape[1]))
    return np.concatenate(convolved)[1:]


def _expected(x, kernel):
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0))).astype(np.float64)
    outputs = [correlate(padded, taps, mode="valid")[..., 0] for taps in np.moveaxis(kernel, 3, 0)]
    return np.stack(outputs, axis=-1)


@pytest.mark.parametrize("bins", [1, 4, 37, 40])
@pytest.mark.parametrize("sizes", [[], [1], [1, 1, 3], [4]])
def test_equal_to_scipys_correlation(bins, sizes):
    rng = np.random.default_rng(bins)
    x = rng.normal(size=(6, bins, 5)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 5, 2)).astype(np.float32)
    expected = _expected(x, kernel)
    np.testing.assert_allclose(_convolve(x, kernel, jnp.float32, sizes), expected, atol=1e-4)


def test_products_of_bfloat16_are_near():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 200, 32)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 32, 16)).astype(np.float32)
    expected = _expected(x, kernel)
    error = _convolve(x, kernel, jnp.bfloat16, [2]) - expected
    assert 1e-4 < np.sqrt(np.mean(error**2) / np.mean(expected**2)) < 1e-2


@pytest.mark.parametrize("bins", [1, 4, 6, 9])
def test_bins_are_split_and_joined(bins):
    x = np.random.default_rng(bins).normal(size=(3, bins, 2)).astype(np.float32)
    np.testing.assert_array_equal(winograd.join_bins(winograd.split_bins(x), bins), x)
    exist = [np.broadcast_to(part[None], (1, *part.shape)) for part in winograd.bins_exist(bins)]
    assert np.asarray(winograd.join_bins(exist, 4 * winograd.num_tiles(bins))).sum() == bins
