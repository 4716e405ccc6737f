"""The STFT of the watermark: frames of a Hann window that overlap by half.

As the reference's stft.py: zeros are added up to a multiple of the frame (a whole frame of them if
it is one), then half a frame at both ends is mirrored, as torch.stft does it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def window(n_fft: int) -> np.ndarray:
    """Hann's window, periodic, float32 [n_fft]."""
    angles = 2 * np.pi * np.arange(n_fft) / n_fft
    return (0.5 - 0.5 * np.cos(angles)).astype(np.float32)


@functools.cache
def overlap(n_fft: int) -> np.ndarray:
    """What the squared windows of two frames add up to, float32 [n_fft / 2]."""
    squared = window(n_fft).astype(np.float64) ** 2
    return (squared[: n_fft // 2] + squared[n_fft // 2 :]).astype(np.float32)


def padded_length(num_samples: int, n_fft: int) -> int:
    """Samples with the zeros at the end."""
    return num_samples + n_fft - num_samples % n_fft


def num_frames(num_samples: int, n_fft: int) -> int:
    return padded_length(num_samples, n_fft) // (n_fft // 2) + 1


def split_frames(samples: np.ndarray, n_fft: int) -> np.ndarray:
    """Samples [n] as frames [T, n_fft], without the window."""
    hop = n_fft // 2
    padded = np.pad(samples, (0, padded_length(len(samples), n_fft) - len(samples)))
    mirrored = np.pad(padded, hop, mode="reflect")
    starts = hop * np.arange(num_frames(len(samples), n_fft))
    return mirrored[starts[:, None] + np.arange(n_fft)]


def transform(frames: jax.Array) -> jax.Array:
    """Frames [T, n_fft] -> their spectra, complex64 [T, n_fft / 2 + 1]."""
    return jnp.fft.rfft(frames * window(frames.shape[-1])[None])


def magnitude(spectrum: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.real(spectrum) ** 2 + jnp.imag(spectrum) ** 2)


def subtract(spectrum: jax.Array, mark: jax.Array) -> jax.Array:
    """Takes a mark [T, band] from the magnitudes of spectra [T, F]; phases stay."""
    band = mark.shape[1]
    carrier = magnitude(spectrum[:, :band])
    # Magnitudes of 0 stay 0: a mark only takes away.
    left = jnp.maximum(carrier - mark, 0) / jnp.where(carrier > 0, carrier, 1)
    return spectrum.at[:, :band].multiply(left.astype(spectrum.dtype))


def invert(spectrum: jax.Array) -> jax.Array:
    """Spectra -> frames [T, n_fft] under the window, to be added up and divided by `overlap`."""
    n_fft = 2 * (spectrum.shape[-1] - 1)
    return jnp.fft.irfft(spectrum, n_fft) * window(n_fft)[None]


def join_frames(frames: np.ndarray) -> np.ndarray:
    """Frames of `invert` [T, n_fft] -> the samples that two of them cover, [(T - 1) n_fft / 2]."""
    hop = frames.shape[1] // 2
    return ((frames[:-1, hop:] + frames[1:, :hop]) / overlap(2 * hop)).ravel()
