"""Marks audio while it is generated.

The mark of a frame depends on the frames around it, `WatermarkConfig.reach` on either side, so the
marked audio comes later than the audio; `Marker.delay` says by how many samples at most.

The reference takes two things from the whole recording: the statistics of its normalization, and
its mean power. Here the statistics are those of the training, and the power is that up to each
frame, so that a stream and a whole recording get the same mark. `reference.embed_like_reference`
does as the reference does.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.io.samples import check_samples
from csm_jax.watermark import network, spectrum, winograd
from csm_jax.watermark.checkpoint import Weights
from csm_jax.watermark.config import TRAINED_POWER, WatermarkConfig
from csm_jax.watermark.message import PUBLIC_KEY, Key, to_symbols
from csm_jax.watermark.network import Params, Statistics
from csm_jax.watermark.resampling import Resampler

# How far the mark lies below the speech, in dB, as in Sesame's code.
SDR = 36.0
# -60 dB: what is quieter than this is not raised to the power of speech.
_LEAST_POWER = 1e-6
# Of a recording that has not ended.
_NO_END = np.int32(2**30)
# Frames that can be marked at once; as many as there are, as they take less time than one by one.
_STEPS = (8, 2, 1)

State = dict[str, Any]


def _empty_state(weights: Weights) -> State:
    """What is kept between steps.

    `carrier` and `decoder` are of the last two frames of the input of each layer of 3 x 3;
    `spectra` [reach, n_fft / 2 + 1] and their `gains` [reach] wait for their mark.
    """
    config = weights.config
    kept = {
        name: [winograd.empty_frames(config.num_inputs, kernel) for kernel in kernels]
        for name, kernels in weights.fast_kernels.items()
    }
    return kept | {
        "spectra": np.zeros((config.reach, config.num_bins), np.complex64),
        "gains": np.ones(config.reach, np.float32),
    }


def _carrier_rms(config: WatermarkConfig) -> float:
    """Root mean square of the magnitudes of sound with the power of training.

    The squared window adds up to 3/8 of its length.
    """
    return (3 / 8 * config.n_fft * TRAINED_POWER) ** 0.5


@functools.partial(jax.jit, static_argnames=("config", "sdr"))
def _mark_frames(
    params: Params,
    kernels: dict[str, list[list[jax.Array]]],
    config: WatermarkConfig,
    sdr: float,
    state: State,
    symbols: jax.Array,
    frames: jax.Array,
    powers: jax.Array,
    start: jax.Array,
    num_frames: jax.Array,
) -> tuple[State, jax.Array]:
    """Takes T frames, and gives the T frames that lie `reach` before them, marked.

    Args:
      kernels: those of the layers of 3 x 3, as `winograd.convolve` takes them.
      symbols: of one message, int [period].
      frames: samples [T, n_fft], without the window.
      powers: mean power of the samples up to each frame, [T].
      start: index of the first frame.
      num_frames: frames of the recording; those after them are padding.
    """
    count, reach, bins = len(frames), config.reach, config.num_inputs
    indices = start + jnp.arange(count)
    kept: dict[str, list[list[jax.Array]]] = {"carrier": [], "decoder": []}
    bins_exist = winograd.bins_exist(bins)

    def run_layers(name: str, places: list[jax.Array], lag: int) -> list[jax.Array]:
        """The layers of 3 x 3; each gives the frame before the last one that it takes."""
        for index, layer in enumerate(params[name][: len(kernels[name])]):
            at = indices - lag - index
            exist = ((at >= 0) & (at < num_frames))[:, None, None]
            # As each layer of the reference pads its input with zeros.
            places = [
                jnp.where(exist & inside[None], place, 0)
                for place, inside in zip(places, bins_exist, strict=True)
            ]
            places, recent = winograd.convolve(places, state[name][index], kernels[name][index])
            places = [network.finish_layer(layer, place, Statistics.TRAINED) for place in places]
            kept[name].append(recent)
        return places

    spectra = jnp.concatenate([state["spectra"], spectrum.transform(frames)])
    gains = jnp.concatenate([state["gains"], jnp.sqrt(TRAINED_POWER / powers)])
    carrier = spectrum.magnitude(spectra[:, :bins]) * gains[:, None]
    encoded = run_layers("carrier", winograd.split_bins(carrier[reach:, :, None]), lag=0)
    lag = config.carrier_layers
    delayed = carrier[reach - lag : reach - lag + count]
    message = network.embed_symbols(params, symbols[(indices - lag) % config.period], bins)
    others = winograd.split_bins(jnp.stack([delayed, message], axis=-1))
    inputs = [
        network.decoder_input(other[..., 0], place, other[..., 1])
        for place, other in zip(encoded, others, strict=True)
    ]
    last = params["decoder"][-1]
    places = [
        network.finish_layer(last, place @ last["kernel"][0, 0], Statistics.TRAINED)
        for place in run_layers("decoder", inputs, lag)
    ]
    h = winograd.join_bins(places, bins)
    mark = network.normalize_mark(config, h, sdr) * _carrier_rms(config)
    marked = spectrum.subtract(spectra[:count], mark / gains[:count, None])
    after = kept | {"spectra": spectra[count:], "gains": gains[count:]}
    return after, spectrum.invert(marked)


class _Frames:
    """Cuts a stream into the frames of the STFT, with the mean power up to each."""

    def __init__(self, n_fft: int):
        self._n_fft, self._hop = n_fft, n_fft // 2
        # From the start of the next frame on; None until the start can be mirrored.
        self._waiting = np.zeros(0, np.float32)
        self._is_started = False
        self._energy = 0.0
        self.num_samples = self.num_frames = 0

    def add(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes the next samples; gives the frames [T, n_fft] that are complete, and powers [T]."""
        self.num_samples += len(samples)
        self._waiting = np.concatenate([self._waiting, samples])
        return self._take()

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Gives the other frames: those of the zeros and of the mirrored end."""
        zeros = spectrum.padded_length(self.num_samples, self._n_fft) - self.num_samples
        padded = np.pad(self._waiting, (0, zeros))
        self._waiting = np.pad(padded, (0, self._hop), mode="reflect")
        return self._take()

    def _take(self) -> tuple[np.ndarray, np.ndarray]:
        if not self._is_started:
            if len(self._waiting) <= self._hop:
                return np.zeros((0, self._n_fft), np.float32), np.zeros(0, np.float32)
            self._waiting = np.pad(self._waiting, (self._hop, 0), mode="reflect")
            self._is_started = True
        count = max(len(self._waiting) // self._hop - 1, 0)
        starts = self._hop * np.arange(count)
        frames = self._waiting[starts[:, None] + np.arange(self._n_fft)]
        self._waiting = self._waiting[count * self._hop :]
        return frames, self._measure(frames)

    def _measure(self, frames: np.ndarray) -> np.ndarray:
        """Mean power of the samples up to the middle of each frame and half a frame more."""
        powers = np.empty(len(frames), np.float32)
        for index, frame in enumerate(frames):
            begin = self.num_frames * self._hop
            if begin < self.num_samples:  # else it is the mirrored end
                self._energy += float(np.sum(frame[self._hop :].astype(np.float64) ** 2))
            seen = min(begin + self._hop, self.num_samples)
            powers[index] = max(self._energy / seen, _LEAST_POWER)
            self.num_frames += 1
        return powers


class Marker:
    """Marks one stream of mono audio.

    What `add` and `finish` give, joined, is as long as what they took, and does not depend on the
    pieces.

    Attributes:
      delay: samples by which the marked audio comes later, at most.
    """

    def __init__(
        self,
        weights: Weights,
        key: Sequence[int],
        sample_rate: int,
        sdr: float = SDR,
    ):
        """Makes a marker.

        Args:
          key: five numbers from 0 to 255.
          sample_rate: of the audio, in Hz.
          sdr: how far the mark lies below the speech, in dB.
        """
        self._weights, self._sdr = weights, sdr
        self._symbols = to_symbols(key)
        config = weights.config
        self._state = _empty_state(weights)
        rate = config.sample_rate
        self._up = Resampler(sample_rate, rate) if sample_rate != rate else None
        self._down = Resampler(rate, sample_rate) if sample_rate != rate else None
        self._frames = _Frames(config.n_fft)
        self._start = 0  # index of the next frame
        self._half = np.zeros(config.hop, np.float32)  # second half of the last marked frame
        self._num_in = self._num_out = self._num_marked = 0
        self.delay = self._count_delay()

    def _count_delay(self) -> int:
        config = self._weights.config
        delay = (config.reach + 2) * config.hop
        if self._up is None or self._down is None:
            return delay
        back = delay + self._down.width + self._down.source
        return -(-back * self._up.source // self._up.target) + self._up.width + self._up.source

    def add(self, samples: np.ndarray) -> np.ndarray:
        """Takes the next samples, float [n], and gives those that are marked by now."""
        samples = np.asarray(samples, np.float32)
        self._num_in += len(samples)
        marked = self._mark(samples if self._up is None else self._up.add(samples))
        return self._count(marked if self._down is None else self._down.add(marked))

    def warm_up(self) -> None:
        """Compiles what any audio needs, before there is any."""
        for step in _STEPS:
            frames = np.zeros((step, self._weights.config.n_fft), np.float32)
            self._feed(frames, np.ones(step, np.float32), _NO_END)

    def finish(self) -> np.ndarray:
        """Gives the rest."""
        if not self._num_in:
            return np.zeros(0, np.float32)
        last = np.zeros(0, np.float32) if self._up is None else self._up.finish()
        marked = [self._mark(last), self._mark_rest()]
        if self._down is not None:
            marked = [self._down.add(np.concatenate(marked)), self._down.finish()]
        return self._count(np.concatenate(marked))

    def _count(self, samples: np.ndarray) -> np.ndarray:
        """Cuts what the way to another rate and back adds."""
        samples = samples[: self._num_in - self._num_out]
        self._num_out += len(samples)
        return samples

    def _mark(self, samples: np.ndarray) -> np.ndarray:
        frames, powers = self._frames.add(samples)
        return self._feed(frames, powers, _NO_END)

    def _mark_rest(self) -> np.ndarray:
        frames, powers = self._frames.finish()
        # Frames that push out the last ones.
        extra = self._weights.config.reach
        frames = np.pad(frames, ((0, extra), (0, 0)))
        powers = np.pad(powers, (0, extra), constant_values=1)
        left = self._frames.num_samples - self._num_marked
        return self._feed(frames, powers, np.int32(self._frames.num_frames))[:left]

    def _feed(self, frames: np.ndarray, powers: np.ndarray, num_frames: np.int32) -> np.ndarray:
        """Marks frames; gives the samples that are certain."""
        marked, at = [np.zeros(0, np.float32)], 0
        while at < len(frames):
            count = next(step for step in _STEPS if step <= len(frames) - at)
            step = slice(at, at + count)
            marked.append(self._mark_step(frames[step], powers[step], num_frames))
            at += count
        samples = np.concatenate(marked)
        self._num_marked += len(samples)
        return samples

    def _mark_step(
        self, frames: np.ndarray, powers: np.ndarray, num_frames: np.int32
    ) -> np.ndarray:
        weights = self._weights
        self._state, marked = _mark_frames(
            weights.params,
            weights.fast_kernels,
            weights.config,
            self._sdr,
            self._state,
            self._symbols,
            frames,
            powers,
            np.int32(self._start),
            num_frames,
        )
        first = self._start - weights.config.reach
        self._start += len(frames)
        frames = np.asarray(marked)[max(-first, 0) :]
        if not len(frames):
            return np.zeros(0, np.float32)
        hop = weights.config.hop
        joined = spectrum.join_frames(
            np.concatenate([np.concatenate([np.zeros_like(self._half), self._half])[None], frames])
        )
        self._half = frames[-1, hop:]
        # Before the first frame there is only the mirrored start.
        return joined[hop:] if first <= 0 else joined


@dataclass(frozen=True)
class Watermark:
    """What marks all speech of a command or a server: networks, key, and strength in dB."""

    weights: Weights
    key: Key = PUBLIC_KEY
    sdr: float = SDR

    def marker(self, sample_rate: int) -> Marker:
        """Marks one stream."""
        return Marker(self.weights, self.key, sample_rate, self.sdr)

    def warm_up(self, sample_rate: int) -> None:
        """Compiles what streams and whole recordings need."""
        self.marker(sample_rate).warm_up()

    def embed(self, audio: np.ndarray, sample_rate: int) -> np.ndarray:
        """Marks a whole recording, float [num_samples]."""
        return embed(audio, sample_rate, self.weights, self.key, self.sdr)


def embed(
    audio: np.ndarray,
    sample_rate: int,
    weights: Weights,
    key: Sequence[int] = PUBLIC_KEY,
    sdr: float = SDR,
) -> np.ndarray:
    """Marks a recording, float [num_samples] -> float32 [num_samples].

    Raises:
      InputError: audio that is not mono, not float, or not finite; or a key that is none.
    """
    samples = check_samples(audio)
    marker = Marker(weights, key, sample_rate, sdr)
    return np.concatenate([marker.add(samples), marker.finish()])
