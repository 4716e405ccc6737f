"""Reads marks in recordings."""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.io.samples import check_samples, is_silent
from csm_jax.watermark import network, spectrum
from csm_jax.watermark.checkpoint import Weights
from csm_jax.watermark.config import TRAINED_POWER, WatermarkConfig
from csm_jax.watermark.decision import (
    MIN_KNOWN_PERIODS,
    Detection,
    Verdict,
    decide,
    find_consensus,
)
from csm_jax.watermark.message import PUBLIC_KEY, Key
from csm_jax.watermark.network import Params
from csm_jax.watermark.resampling import resample

# Samples between the shifts that the reference tries.
REFERENCE_STEP = 10
# Shifts of a hop that are tried first here.
_COARSE_SHIFTS = 16
# Periods that are read to find the shift, and that are read at once.
_SEARCH_PERIODS = 4
_READ_PERIODS = 20


def read_symbols(samples: np.ndarray, weights: Weights, shift: int = 0) -> np.ndarray:
    """The symbols of a recording at the network's rate, float [n] -> int [T]; as the reference.

    Args:
      shift: samples to leave out at the start, so that frames lie as they were marked.
    """
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    gain = (TRAINED_POWER / power) ** 0.5 if power else 1.0
    scaled = samples[shift:].astype(np.float32) * np.float32(gain)
    frames = spectrum.split_frames(scaled, weights.config.n_fft)
    return np.asarray(_read(weights.params, weights.config, frames))


@functools.partial(jax.jit, static_argnames="config")
def _read(params: Params, config: WatermarkConfig, frames: jax.Array) -> jax.Array:
    carrier = spectrum.magnitude(spectrum.transform(jnp.asarray(frames)))
    return jnp.argmax(network.symbol_logits(params, config, carrier), axis=-1)


def find_shift(samples: np.ndarray, weights: Weights, shifts: Iterable[int]) -> tuple[int, int]:
    """The shift whose symbols agree most, the first of equals, and how many were tried.

    With all steps of 10 samples of a hop this is the reference's search; it ends when all symbols
    agree, since no later shift could be better.
    """
    period = weights.config.period
    best, best_share, tried = 0, 0.0, 0
    for shift in shifts:
        symbols = read_symbols(samples, weights, shift)
        tried += 1
        if len(symbols) < period:
            continue
        _, share = find_consensus(symbols, period)
        if share > best_share:
            best, best_share = shift, share
        if share == 1.0:
            break
    return best, tried


def detect(
    audio: np.ndarray, sample_rate: int, weights: Weights, known: Sequence[Key] = (PUBLIC_KEY,)
) -> Detection:
    """Looks for a mark in mono audio, float [num_samples], cut anywhere and at any rate.

    The keys in `known` are found in 3 s, unknown ones in 5 s. The shift is found with the loudest
    seconds, first coarsely and then in steps of 10 samples.

    Raises:
      InputError: audio that is not mono, not float or int16, or not finite.
    """
    samples = check_samples(audio)
    config = weights.config
    if not len(samples) or is_silent(samples):
        return Detection(Verdict.NOT_FOUND, None, 0.0, 1.0)
    samples = resample(samples, sample_rate, config.sample_rate)
    found = decide(_read_all(samples, weights, 0), config.period, known)
    if found.verdict is Verdict.MARKED or len(samples) < MIN_KNOWN_PERIODS * _period(config):
        return found
    excerpt, start = _loudest(samples, config)
    step = config.hop // _COARSE_SHIFTS
    coarse, tried = find_shift(excerpt, weights, range(0, config.hop, step))
    near = range(coarse - step // 2, coarse + step // 2, REFERENCE_STEP)
    fine, more = find_shift(excerpt, weights, [coarse, *(shift % config.hop for shift in near)])
    shift = (start + fine) % config.hop
    return decide(_read_all(samples, weights, shift), config.period, known, 1 + tried + more)


def _period(config: WatermarkConfig) -> int:
    """Samples of a message."""
    return config.period * config.hop


def _read_all(samples: np.ndarray, weights: Weights, shift: int) -> np.ndarray:
    """The symbols of a recording of any length, read in parts that are whole periods."""
    config = weights.config
    part = _READ_PERIODS * _period(config)
    samples = samples[shift:]
    count = len(samples) // config.hop
    symbols = [
        read_symbols(samples[start : start + part], weights)[: part // config.hop]
        for start in range(0, len(samples), part)
        if np.any(samples[start : start + part])
    ]
    # Frames of which more than half are padding are not counted.
    return np.concatenate(symbols)[:count] if symbols else np.zeros(0, np.int32)


def _loudest(samples: np.ndarray, config: WatermarkConfig) -> tuple[np.ndarray, int]:
    """The loudest part of the length to search in, and where it starts."""
    length = _SEARCH_PERIODS * _period(config)
    starts = range(0, max(len(samples) - length, 0) + 1, config.hop)
    energy = np.concatenate([[0], np.cumsum(np.square(samples, dtype=np.float64))])
    start = max(starts, key=lambda at: energy[min(at + length, len(samples))] - energy[at])
    return samples[start : start + length], start
