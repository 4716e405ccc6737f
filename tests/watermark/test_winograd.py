"""The fast convolution is the convolution."""

import numpy as np
import pytest
from scipy.signal import correlate

from csm_jax.watermark.winograd import convolve, transform_kernel


@pytest.mark.parametrize("bins", [1, 4, 37, 40])
@pytest.mark.parametrize("count", [1, 3])
def test_equal_to_scipys_correlation(bins, count):
    rng = np.random.default_rng(bins)
    x = rng.normal(size=(count + 2, bins, 5)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 5, 2)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    found = convolve(x, transform_kernel(kernel))
    for output in range(2):
        expected = correlate(padded, kernel[..., output], mode="valid")[..., 0]
        np.testing.assert_allclose(found[..., output], expected, atol=1e-4)
