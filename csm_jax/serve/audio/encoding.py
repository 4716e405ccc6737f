"""Encodes speech in an audio format, in pieces or as a whole, and changes its speed and rate.

ffmpeg's libraries (PyAV) encode. Both ways make the same audio, but only the head of a whole file
contains its length.
"""

import io
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, NamedTuple, cast

import av
import av.error
import av.filter
import numpy as np

from csm_jax.errors import InputError
from csm_jax.io.audio import encode_audio, to_pcm, wav_header


class Coding(NamedTuple):
    """How ffmpeg encodes a format, in its own names."""

    container: str
    codec: str
    sample_format: str


class Format(NamedTuple):
    """An audio format.

    Attributes:
      suffix: of such files.
      coding: None for plain samples.
      sample_rate: of the file, in Hz; None is that of the speech.
      bit_rate: bits per second; None is the codec's default.
    """

    suffix: str
    media_type: str
    coding: Coding | None = None
    sample_rate: int | None = None
    bit_rate: int | None = None


FormatName = Literal["wav", "pcm", "mp3", "opus", "flac", "aac"]
FORMATS: dict[str, Format] = {
    "wav": Format("wav", "audio/wav"),
    "pcm": Format("pcm", "audio/pcm"),
    "mp3": Format("mp3", "audio/mpeg", Coding("mp3", "libmp3lame", "fltp")),
    "opus": Format("opus", "audio/ogg", Coding("ogg", "libopus", "flt")),
    "flac": Format("flac", "audio/flac", Coding("flac", "flac", "s16")),
    "aac": Format("aac", "audio/aac", Coding("adts", "aac", "fltp")),
}
_TELEPHONE = {
    "ulaw": Format("ulaw", "audio/basic", Coding("mulaw", "pcm_mulaw", "s16")),
    "alaw": Format("alaw", "audio/x-alaw-basic", Coding("alaw", "pcm_alaw", "s16")),
}


def _rated(name: str) -> Format:
    """The format of a name CODEC_HZ or CODEC_HZ_KBPS."""
    codec, sample_rate, *kbps = name.split("_")
    return (FORMATS | _TELEPHONE)[codec]._replace(
        sample_rate=int(sample_rate), bit_rate=1000 * int(kbps[0]) if kbps else None
    )


_RATES = (8000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_KBPS = (32, 64, 96, 128, 192)
# ElevenLabs' names of formats.
RATED_FORMATS: dict[str, Format] = {
    name: _rated(name)
    for name in [
        *("mp3_22050_32", "mp3_24000_48", *(f"mp3_44100_{kbps}" for kbps in _KBPS)),
        *(f"{codec}_{rate}" for codec in ("pcm", "wav") for rate in _RATES),
        *("ulaw_8000", "alaw_8000"),
        *(f"opus_48000_{kbps}" for kbps in _KBPS),
    ]
}
# The range of one atempo filter.
_SLOWEST, _FASTEST = 0.5, 2.0


def encode(audio: np.ndarray, sample_rate: int, name: str, speed: float = 1.0) -> bytes:
    """Encodes a recording, float32 [num_samples], as a file in a format of `find_format`."""
    form = find_format(name)
    rate = form.sample_rate or sample_rate
    if filtered := _new_filter(sample_rate, speed, rate):
        audio = np.concatenate([filtered.add(audio), filtered.finish()])
    if form.coding is None:
        return encode_audio(audio, rate, f".{form.suffix}")
    # The encoder can seek in a whole file, and then writes the length into its head.
    file = io.BytesIO()
    encoder = _ContainerEncoder(form.coding, rate, form.bit_rate, file)
    encoder.add(audio)
    encoder.finish()
    return file.getvalue()


class Encoder:
    """Encodes chunks of speech. The bytes of all calls together are one file."""

    def __init__(self, name: str, sample_rate: int, speed: float = 1.0):
        """Starts a file in a format of `find_format`."""
        form = find_format(name)
        rate = form.sample_rate or sample_rate
        self._filter = _new_filter(sample_rate, speed, rate)
        self._sink = _Sink()
        if form.coding:
            self._encoder = _ContainerEncoder(form.coding, rate, form.bit_rate, self._sink)
        else:
            self._encoder = _PcmEncoder(self._sink)
            self._sink.write(wav_header(rate) if form.suffix == "wav" else b"")

    def add(self, samples: np.ndarray) -> bytes:
        """Adds samples, float32 [n], and returns the bytes that are ready."""
        self._encoder.add(self._filter.add(samples) if self._filter else samples)
        return self._sink.drain()

    def finish(self) -> bytes:
        """Ends the file, and returns the remaining bytes."""
        if self._filter:
            self._encoder.add(self._filter.finish())
        self._encoder.finish()
        return self._sink.drain()


def find_format(name: str) -> Format:
    """One of `FORMATS` or `RATED_FORMATS`. Raises `InputError` for any other."""
    known = FORMATS | RATED_FORMATS
    if name not in known:
        raise InputError(f"the format is {name[:80]!r}, but must be one of {', '.join(known)}")
    return known[name]


class _Sink:
    """A file that can only be written to, and whose bytes are taken as they arrive."""

    def __init__(self):
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def drain(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


class _PcmEncoder:
    """Writes plain samples of 16 bits."""

    def __init__(self, sink: _Sink):
        self._sink = sink

    def add(self, samples: np.ndarray) -> None:
        self._sink.write(to_pcm(samples))

    def finish(self) -> None:
        pass


class _ContainerEncoder:
    """Writes a container by ffmpeg."""

    def __init__(
        self, coding: Coding, sample_rate: int, bit_rate: int | None, sink: "_Sink | io.BytesIO"
    ):
        # By default ffmpeg writes a random stream number.
        options = {"fflags": "+bitexact", "flush_packets": "1"}
        self._container = av.open(sink, "w", coding.container, options=options)
        stream = self._container.add_stream(coding.codec, rate=sample_rate, layout="mono")
        # PyAV's annotations allow any kind of stream here.
        self._stream = cast(av.AudioStream, stream)
        context = self._stream.codec_context
        context.format = coding.sample_format
        if bit_rate is not None:
            context.bit_rate = bit_rate
        context.open()
        # The codec needs frames of a fixed size.
        self._cutter = av.AudioResampler(
            coding.sample_format, "mono", sample_rate, context.frame_size or None
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
            self.add(np.zeros(self._sample_rate // 100, np.float32))  # players refuse an empty file
        self._encode(self._cutter.resample(None))
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def _encode(self, frames: list[av.AudioFrame]) -> None:
        for frame in frames:
            self._container.mux(self._stream.encode(frame))


def _new_filter(sample_rate: int, speed: float, new_rate: int) -> "_Filter | None":
    """A filter, if the speed or the sample rate changes."""
    if speed == 1 and new_rate == sample_rate:
        return None
    return _Filter(sample_rate, speed, new_rate)


class _Filter:
    """Changes the speed of speech at the same pitch (ffmpeg's atempo), and its sample rate."""

    def __init__(self, sample_rate: int, speed: float, new_rate: int):
        self._sample_rate = sample_rate
        self._num_samples = 0
        self._graph = av.filter.Graph()
        source = self._graph.add_abuffer(
            format="flt", sample_rate=sample_rate, layout="mono", time_base=Fraction(1, sample_rate)
        )
        factors = _factors(speed) if speed != 1 else []
        filters = [self._graph.add("atempo", f"{factor:.6f}") for factor in factors]
        sample_format = f"sample_fmts=flt:sample_rates={new_rate}:channel_layouts=mono"
        chain = [
            source,
            *filters,
            self._graph.add("aformat", sample_format),
            self._graph.add("abuffersink"),
        ]
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
                yield cast(av.AudioFrame, self._graph.pull()).to_ndarray()[0]
            except (av.error.BlockingIOError, av.error.EOFError):
                return


def _factors(speed: float) -> list[float]:
    """Factors in the range of atempo, whose product is `speed`."""
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
