"""Marks a whole recording exactly as the package silentcipher does, for comparison with it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.watermark import network, spectrum
from csm_jax.watermark.checkpoint import Weights
from csm_jax.watermark.config import TRAINED_POWER, WatermarkConfig
from csm_jax.watermark.message import to_symbols
from csm_jax.watermark.network import Params, Statistics


def embed_like_reference(
    audio: np.ndarray,
    weights: Weights,
    key: Sequence[int],
    sdr: float,
    statistics: Statistics = Statistics.RECORDING,
) -> np.ndarray:
    """Marks float [num_samples] at the network's own rate; silence is returned as it is.

    Args:
      statistics: RECORDING is what the package does.
    """
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    if not power:
        return audio
    config = weights.config
    gain = np.float32((TRAINED_POWER / power) ** 0.5)
    frames = spectrum.split_frames(audio.astype(np.float32) * gain, config.n_fft)
    symbols = to_symbols(key)[np.arange(len(frames)) % config.period]
    marked = _mark(weights.params, config, frames, symbols, sdr, statistics)
    return spectrum.join_frames(np.asarray(marked))[: len(audio)] / gain


@functools.partial(jax.jit, static_argnames=("config", "sdr", "statistics"))
def _mark(
    params: Params,
    config: WatermarkConfig,
    frames: jax.Array,
    symbols: jax.Array,
    sdr: float,
    statistics: Statistics,
) -> jax.Array:
    spectra = spectrum.transform(jnp.asarray(frames))
    carrier = spectrum.magnitude(spectra)
    mark = network.make_mark(params, config, carrier, symbols, sdr, statistics)
    return spectrum.invert(spectrum.subtract(spectra, mark))
