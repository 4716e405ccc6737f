"""Recordings with a mark that a stand-in for the network reads: the pitch of frames is the symbol.

Random networks read no message.
"""

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.watermark import reading, spectrum
from csm_jax.watermark.checkpoint import Weights
from csm_jax.watermark.config import tiny
from csm_jax.watermark.message import to_symbols

CONFIG = tiny()
RATE = CONFIG.sample_rate
KEY = (17, 202, 5, 99, 240)
# Bins whose tones are the symbols 0 to 4.
BINS = np.array([4, 7, 10, 13, 16])


def read_pitches(monkeypatch) -> Weights:
    """Has the pitch of each frame read."""

    @jax.jit
    def read(frames):
        spectra = jnp.abs(spectrum.transform(frames))
        return jnp.argmax(spectra[:, BINS], axis=1)

    monkeypatch.setattr(reading, "_read", lambda params, config, frames: read(frames))
    return Weights(CONFIG, {})


def tones(num_frames):
    """Frame t is centered at t hops, and its tone fills a hop around that."""
    hop = CONFIG.hop
    symbols = np.resize(to_symbols(KEY), num_frames)
    times = np.arange(num_frames * hop) - hop // 2
    bins = BINS[symbols[(np.arange(len(times))) // hop]]
    sounds = 0.3 * np.sin(2 * np.pi * bins * times / CONFIG.n_fft)
    return sounds[hop // 2 :].astype(np.float32)
