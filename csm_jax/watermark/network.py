"""SilentCipher's networks: the encoder of the carrier, and the decoders of mark and message.

Singh et al., "SilentCipher: Deep Audio Watermarking" (2024); the reference is the package
silentcipher, model.py. The carrier is the magnitude of an STFT.

Axes: T frames, F bins of the spectrum, C channels.

The reference runs its batch normalization in training mode, with the statistics of the recording:
`Statistics.RECORDING` is equal to it, and needs all frames at once. `Statistics.TRAINED` takes the
statistics of the training, and so can run frame by frame.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from csm_jax.watermark.config import WatermarkConfig

Params = dict[str, Any]
_EPSILON = 1e-5  # of torch's BatchNorm2d
_SMALLEST = 1e-30


class Statistics(enum.Enum):
    """Where the batch normalization takes its mean and variance from."""

    RECORDING = "recording"
    TRAINED = "trained"


def gated_layer(params: Params, x: jax.Array, statistics: Statistics) -> jax.Array:
    """A gated convolution and its normalization, [T, F, C] -> [T, F, C'].

    Args:
      params: kernel [time, bins, C, 2 C'], whose output is values and gates; bias [2 C'];
        scale, shift, mean, variance [C'].
    """
    times, bins = params["kernel"].shape[:2]
    both = lax.conv_general_dilated(
        x[None],
        params["kernel"],
        (1, 1),
        ((times // 2, times // 2), (bins // 2, bins // 2)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )[0]
    return finish_layer(params, both, statistics)


def finish_layer(params: Params, both: jax.Array, statistics: Statistics) -> jax.Array:
    """What follows the convolution of a layer, [T, F, 2 C'] -> [T, F, C']."""
    values, gates = jnp.split(both + params["bias"][None, None], 2, axis=-1)
    h = values * jax.nn.sigmoid(gates)
    if statistics is Statistics.RECORDING:
        mean, variance = jnp.mean(h, axis=(0, 1)), jnp.var(h, axis=(0, 1))
    else:
        mean, variance = params["mean"], params["variance"]
    factor = params["scale"] * lax.rsqrt(variance + _EPSILON)
    return h * factor[None, None] + (params["shift"] - mean * factor)[None, None]


def embed_symbols(params: Params, symbols: jax.Array, num_bins: int) -> jax.Array:
    """The symbols of frames as a channel of the decoder: int [T] -> [T, F], zero above the band."""
    linear = params["symbols"]
    band = linear["kernel"][symbols] + linear["bias"][None]
    return jnp.pad(band, ((0, 0), (0, num_bins - band.shape[1])))


def decoder_input(carrier: jax.Array, encoded: jax.Array, message: jax.Array) -> jax.Array:
    """Carrier [T, F], its encoding [T, F, C] and message [T, F] -> [T, F, C + 2].

    The reference repeats carrier and message 32 times; here the kernels of the repetitions are
    added up instead (`checkpoint.py`).
    """
    return jnp.concatenate([encoded, carrier[..., None], message[..., None]], axis=-1)


def normalize_mark(config: WatermarkConfig, h: jax.Array, sdr: float) -> jax.Array:
    """The last layer [T, F, 1] -> the mark of a carrier of mean power 1, [T, band]."""
    mark = jnp.abs(h[:, : config.band, 0])
    power = jnp.sum(mark**2, axis=1, keepdims=True) / config.num_bins
    return mark * lax.rsqrt(jnp.maximum(power, _SMALLEST)) * 10 ** (-sdr / 20)


def make_mark(
    params: Params,
    config: WatermarkConfig,
    carrier: jax.Array,
    symbols: jax.Array,
    sdr: float,
    statistics: Statistics = Statistics.RECORDING,
) -> jax.Array:
    """The mark of a whole recording, [T, band], to be subtracted from the carrier [T, F]."""
    h = carrier[..., None]
    for layer in params["carrier"]:
        h = gated_layer(layer, h, statistics)
    h = decoder_input(carrier, h, embed_symbols(params, symbols, config.num_bins))
    for layer in params["decoder"]:
        h = gated_layer(layer, h, statistics)
    return normalize_mark(config, h, sdr) * jnp.sqrt(jnp.mean(carrier**2))


def symbol_logits(params: Params, config: WatermarkConfig, carrier: jax.Array) -> jax.Array:
    """What the decoder of messages reads in a carrier [T, F]: logits [T, num_symbols]."""
    h = carrier[:, : config.band, None]
    for layer in params["message"]:
        h = gated_layer(layer, h, Statistics.RECORDING)
    linear = params["band"]
    logits = jnp.einsum("tfc,f->tc", h, linear["kernel"], precision=lax.Precision.HIGHEST)
    return logits + linear["bias"][None]
