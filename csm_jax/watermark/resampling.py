"""Resampling with a windowed sinc, of a whole recording or of a stream.

The filter is that of torchaudio.functional.resample with its defaults, by which Sesame's code goes
to the rate of the watermark and back: `sinc_interp_hann`, 6 zero crossings, rolloff 0.99.
"""

import functools
import math

import numpy as np

_CROSSINGS = 6
_ROLLOFF = 0.99


@functools.cache
def _filter(source: int, target: int) -> tuple[np.ndarray, int]:
    """The kernel [target, source + 2 width] of reduced rates, and its width in source samples."""
    cutoff = min(source, target) * _ROLLOFF
    width = math.ceil(_CROSSINGS * source / cutoff)
    times = np.arange(-width, width + source) / source - np.arange(target)[:, None] / target
    phases = np.clip(times * cutoff, -_CROSSINGS, _CROSSINGS)
    window = np.cos(phases * np.pi / _CROSSINGS / 2) ** 2
    kernel = np.sinc(phases) * window * (cutoff / source)
    return kernel.astype(np.float32), width


class Resampler:
    """Resamples a stream: what `add` and `finish` give, joined, does not depend on the pieces.

    It works in blocks of `source / gcd` samples, which become `target / gcd`; a block needs
    `width` samples after it.

    Attributes:
      source, target: the rates, divided by their greatest common divisor.
      width: samples of the source on which an output depends, before and after it.
    """

    def __init__(self, source_rate: int, target_rate: int):
        divisor = math.gcd(source_rate, target_rate)
        self.source, self.target = source_rate // divisor, target_rate // divisor
        self._kernel, self.width = _filter(self.source, self.target)
        self._waiting = np.zeros(self.width, np.float32)
        self._num_in = self._num_out = 0

    def add(self, samples: np.ndarray) -> np.ndarray:
        """Takes the next samples, float32 [n], and gives those that are certain by now."""
        self._num_in += len(samples)
        self._waiting = np.concatenate([self._waiting, samples.astype(np.float32)])
        count = max((len(self._waiting) - 2 * self.width) // self.source, 0)
        if not count:
            return np.zeros(0, np.float32)
        size = self.source + 2 * self.width
        blocks = np.lib.stride_tricks.sliding_window_view(self._waiting, size)
        # One product a block: a product of several rounds differently with their number.
        resampled = [self._kernel @ blocks[index * self.source] for index in range(count)]
        self._waiting = self._waiting[count * self.source :]
        self._num_out += count * self.target
        return np.concatenate(resampled)

    def finish(self) -> np.ndarray:
        """Gives the rest, as if silence followed; in all `ceil(n * target / source)` samples."""
        total = -(-self._num_in * self.target // self.source)
        missing, before = total - self._num_out, self._num_in
        rest = self.add(np.zeros(self.source + self.width, np.float32))
        self._num_in = before
        return rest[:missing]


def resample(samples: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """Resamples a whole recording, float32 [n]."""
    if source_rate == target_rate:
        return samples.astype(np.float32)
    resampler = Resampler(source_rate, target_rate)
    return np.concatenate([resampler.add(samples), resampler.finish()])
