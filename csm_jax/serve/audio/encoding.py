"""Speech as bytes of a format, piece by piece; faster or slower if wanted.

ffmpeg's libraries (PyAV) do the coding. What is streamed and what is sent as a whole is the
same; only the heads of the latter also say how long it is.
"""

import io
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np

from csm_jax.audio import encode_audio, to_pcm, wav_header
from csm_jax.errors import InputError


class Format(NamedTuple):
    """How audio is coded; `container` and `codec` are ffmpeg's names, None for plain samples."""

    media_type: str
    container: str | None = None
    codec: str | None = None
    sample_format: str | None = None


FORMATS = {
    "wav": Format("audio/wav"),
    "pcm": Format("audio/pcm"),
    "mp3": Format("audio/mpeg", "mp3", "libmp3lame", "fltp"),
    "opus": Format("audio/ogg", "ogg", "libopus", "flt"),
    "flac": Format("audio/flac", "flac", "flac", "s16"),
    "aac": Format("audio/aac", "adts", "aac", "fltp"),
}
# atempo changes the speed by at most this at a time.
_SLOWEST, _FASTEST = 0.5, 2.0


def encode(audio: np.ndarray, sample_rate: int, name: str, speed: float = 1.0) -> bytes:
    """A whole recording, float32 [num_samples], as a file of one of `FORMATS`."""
    form = _format(name)
    if speed != 1:
        tempo = _Tempo(sample_rate, speed)
        audio = np.concatenate([tempo.add(audio), tempo.finish()])
    if form.container is None:
        return encode_audio(audio, sample_rate, f".{name}")
    # Where the encoder can go back, the head says how long it is.
    file = io.BytesIO()
    coder = _Coded(form, sample_rate, file)
    coder.add(audio)
    coder.finish()
    return file.getvalue()


class Encoder:
    """Turns chunks of speech into bytes of a format. The bytes of all calls make one file."""

    def __init__(self, name: str, sample_rate: int, speed: float = 1.0):
        """Raises `InputError` for a format that is not one of `FORMATS`."""
        form = _format(name)
        self._tempo = _Tempo(sample_rate, speed) if speed != 1 else None
        self._sink = _Sink()
        if form.container:
            self._coder = _Coded(form, sample_rate, self._sink)
        else:
            self._coder = _Plain(self._sink)
            self._sink.write(wav_header(sample_rate) if name == "wav" else b"")

    def add(self, samples: np.ndarray) -> bytes:
        """The bytes that are ready after float32 [n] more samples."""
        self._coder.add(self._tempo.add(samples) if self._tempo else samples)
        return self._sink.drain()

    def finish(self) -> bytes:
        """What is left."""
        if self._tempo:
            self._coder.add(self._tempo.finish())
        self._coder.finish()
        return self._sink.drain()


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise InputError(f"the format is {name}, but must be one of {', '.join(FORMATS)}")
    return FORMATS[name]


class _Sink:
    """A file that can only be written on, whose bytes go away as they come."""

    def __init__(self):
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def drain(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


class _Plain:
    """16-bit samples as they are."""

    def __init__(self, sink: _Sink):
        self._sink = sink

    def add(self, samples: np.ndarray) -> None:
        self._sink.write(to_pcm(samples))

    def finish(self) -> None:
        pass


class _Coded:
    """A container that ffmpeg writes."""

    def __init__(self, form: Format, sample_rate: int, sink: "_Sink | io.BytesIO"):
        # Otherwise a stream has a random number of its own.
        options = {"fflags": "+bitexact", "flush_packets": "1"}
        self._container = av.open(sink, "w", form.container, options=options)
        self._stream = self._container.add_stream(form.codec, rate=sample_rate, layout="mono")
        context = self._stream.codec_context
        context.format = form.sample_format
        context.open()
        # The codec wants frames of its own size.
        self._cutter = av.AudioResampler(
            form.sample_format, "mono", sample_rate, context.frame_size or None
        )
        self._sample_rate = sample_rate
        self._num_samples = 0

    def add(self, samples: np.ndarray) -> None:
        if len(samples):
            frame = _as_frame(samples, self._sample_rate, self._num_samples)
            self._num_samples += len(samples)
            self._encode(self._cutter.resample(frame))

    def finish(self) -> None:
        if not self._num_samples:
            self.add(np.zeros(self._sample_rate // 100, np.float32))  # an empty file plays nowhere
        self._encode(self._cutter.resample(None))
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def _encode(self, frames: list[av.AudioFrame]) -> None:
        for frame in frames:
            self._container.mux(self._stream.encode(frame))


class _Tempo:
    """Faster or slower speech at the same pitch (ffmpeg's atempo)."""

    def __init__(self, sample_rate: int, speed: float):
        self._sample_rate = sample_rate
        self._num_samples = 0
        self._graph = av.filter.Graph()
        source = self._graph.add_abuffer(
            format="flt", sample_rate=sample_rate, layout="mono", time_base=Fraction(1, sample_rate)
        )
        filters = [self._graph.add("atempo", f"{factor:.6f}") for factor in _factors(speed)]
        form = f"sample_fmts=flt:sample_rates={sample_rate}:channel_layouts=mono"
        chain = [source, *filters, self._graph.add("aformat", form), self._graph.add("abuffersink")]
        for one, next_one in itertools.pairwise(chain):
            one.link_to(next_one)
        self._graph.configure()

    def add(self, samples: np.ndarray) -> np.ndarray:
        if len(samples):
            self._graph.push(_as_frame(samples, self._sample_rate, self._num_samples))
            self._num_samples += len(samples)
        return self._pull()

    def finish(self) -> np.ndarray:
        if self._num_samples:
            self._graph.push(None)
        return self._pull()

    def _pull(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.float32), *self._pulled()])

    def _pulled(self) -> Iterator[np.ndarray]:
        while True:
            try:
                yield self._graph.pull().to_ndarray()[0]
            except (av.BlockingIOError, av.EOFError):
                return


def _factors(speed: float) -> list[float]:
    """Factors that atempo can do, whose product is `speed`."""
    factors = []
    while not _SLOWEST <= speed <= _FASTEST:
        factors.append(_SLOWEST if speed < _SLOWEST else _FASTEST)
        speed /= factors[-1]
    return [*factors, speed]


def _as_frame(samples: np.ndarray, sample_rate: int, start: int) -> av.AudioFrame:
    clipped = np.clip(samples, -1, 1).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(clipped, format="flt", layout="mono")
    frame.sample_rate = sample_rate
    frame.time_base = Fraction(1, sample_rate)
    frame.pts = start
    return frame
