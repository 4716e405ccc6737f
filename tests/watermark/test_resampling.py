"""The resampler is a windowed sinc, and does in pieces what it does at once."""

import numpy as np
import pytest

from csm_jax.watermark.resampling import Resampler, resample

RATES = [(24_000, 44_100), (44_100, 24_000), (16_000, 44_100), (48_000, 24_000)]


def _interpolate(samples, source, target):
    """By the formula, in float64: a sinc below both rates, under a squared cosine of 6 zeros."""
    cutoff = 0.99 * min(source, target) / source
    count = -(-len(samples) * target // source)
    distances = (np.arange(len(samples)) - np.arange(count)[:, None] * source / target) * cutoff
    window = np.where(np.abs(distances) < 6, np.cos(np.pi * distances / 12) ** 2, 0)
    return (np.sinc(distances) * window * cutoff) @ samples.astype(np.float64)


@pytest.mark.parametrize(("source", "target"), RATES)
@pytest.mark.parametrize("length", [1, 79, 80, 1000])
def test_equal_to_the_formula_in_any_pieces(source, target, length):
    samples = np.random.default_rng(length).normal(size=length).astype(np.float32)
    whole = resample(samples, source, target)
    np.testing.assert_allclose(whole, _interpolate(samples, source, target), atol=1e-4)
    for size in (1, 7, 333):
        resampler = Resampler(source, target)
        pieces = [resampler.add(samples[at : at + size]) for at in range(0, length, size)]
        np.testing.assert_array_equal(np.concatenate([*pieces, resampler.finish()]), whole)


def test_a_tone_survives_the_way_to_44100_hz_and_back():
    tone = np.sin(2 * np.pi * 1000 * np.arange(24_000) / 24_000).astype(np.float32)
    there = resample(tone, 24_000, 44_100)
    expected = np.sin(2 * np.pi * 1000 * np.arange(44_100) / 44_100)
    np.testing.assert_allclose(there[100:-100], expected[100:-100], atol=2e-3)
    back = resample(there, 44_100, 24_000)
    np.testing.assert_allclose(back[100:-100], tone[100:-100], atol=4e-3)
