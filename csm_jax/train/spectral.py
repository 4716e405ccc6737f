"""Mel spectra, and the distance of two recordings in them.

Mel filters: Stevens, Volkmann and Newman (1937) in O'Shaughnessy's form, triangles of height 1.
Several windows at once, after Yamamoto et al. (2020) and Kumar et al. (2023): a short one resolves
time, a long one pitch.
"""

import functools

import jax.numpy as jnp
import numpy as np

from csm_jax.model.layers import Array

# Samples a window, and mel bands. At 24 kHz: 85 ms to 3 ms. As many bands as there are bins for.
SCALES = ((2048, 128), (1024, 80), (512, 40), (256, 20), (128, 10), (64, 5))
# Consecutive windows are a quarter of a window apart.
OVERLAP = 4
# Smaller magnitudes count as this.
FLOOR = 1e-3


def mel_distance(audio: Array, reference: Array, sample_rate: int) -> Array:
    """The mean distance of log-mel spectra, over `SCALES`.

    Args:
      audio, reference: float32 [B, num_samples].
      sample_rate: Hz.

    Returns:
      Float32 [], in nepers.
    """
    distances = [
        jnp.mean(
            jnp.abs(
                log_mel(audio, sample_rate, window, num_mels)
                - log_mel(reference, sample_rate, window, num_mels)
            )
        )
        for window, num_mels in SCALES
    ]
    return sum(distances[1:], distances[0]) / len(distances)


def log_mel(audio: Array, sample_rate: int, window: int, num_mels: int) -> Array:
    """The log-mel spectrum [B, F, num_mels] of whole windows of [B, num_samples], float32."""
    # Scaled so that the magnitude of a sine is its amplitude.
    hann = np.hanning(window + 1)[:-1] * (4 / window)
    frames = _frames(audio, window) * jnp.asarray(hann, jnp.float32)[None, None]
    mels = jnp.abs(jnp.fft.rfft(frames)) @ mel_filters(sample_rate, window, num_mels)
    return jnp.log(jnp.maximum(mels, FLOOR))


def _frames(audio: Array, window: int) -> Array:
    """Cuts [B, num_samples] into windows [B, F, window], a quarter of a window apart.

    They are made of adjacent slices: gathering them would be slow in the backward pass.
    """
    hop = window // OVERLAP
    hops = audio[:, : audio.shape[1] // hop * hop].reshape(len(audio), -1, hop)
    count = hops.shape[1] - OVERLAP + 1
    return jnp.concatenate([hops[:, i : i + count] for i in range(OVERLAP)], axis=-1)


@functools.cache
def mel_filters(sample_rate: int, window: int, num_mels: int) -> np.ndarray:
    """Triangles evenly spaced in mel from 0 Hz to half the sample rate.

    Returns:
      float32 [window // 2 + 1, num_mels].
    """
    edges = _to_hertz(np.linspace(0, _to_mel(sample_rate / 2), num_mels + 2))
    bins = np.arange(window // 2 + 1) * sample_rate / window
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def _to_mel(hertz: float) -> float:
    return 2595 * np.log10(1 + hertz / 700)


def _to_hertz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)
