"""Audio files of the usual formats to mono float32 samples and back.

libsndfile (soundfile) encodes and decodes, ffmpeg what libsndfile has not (`compressed.py`), soxr
resamples. Sample rates are in Hz.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr

from csm_jax.errors import InputError, OutputError, first_line
from csm_jax.io.av_decoder import MAX_RATE, MIN_RATE
from csm_jax.io.compressed import decode_compressed, find_demuxer
from csm_jax.io.contents import mistaken_content
from csm_jax.io.files import new_file, reporting
from csm_jax.io.outputs import check_writable, is_stream, open_stream, write_all, write_output
from csm_jax.io.samples import INT16_SCALE, MAX_PEAK, check_audio, mono_float32
from csm_jax.io.wav import wav_header, whole_wav

_LOSSY = ("OPUS", "VORBIS", "MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")


class _Format(NamedTuple):
    """A container and coding of libsndfile, and whether it can hold a recording of 0 samples."""

    container: str
    coding: str
    holds_empty: bool


_FORMATS = {
    ".wav": _Format("WAV", "PCM_16", True),
    ".flac": _Format("FLAC", "PCM_16", False),
    ".mp3": _Format("MP3", "MPEG_LAYER_III", False),
    ".ogg": _Format("OGG", "VORBIS", True),
    ".opus": _Format("OGG", "OPUS", False),
    ".pcm": _Format("RAW", "PCM_16", True),
    ".raw": _Format("RAW", "PCM_16", True),
}


def load_audio(path: str | os.PathLike[str], sample_rate: int) -> np.ndarray:
    """Reads a recording as mono float32 [num_samples] at `sample_rate` Hz.

    The content decides the format (wav, flac, mp3, ogg, opus and others that libsndfile reads; m4a,
    mp4, webm and aac, for which PyAV must be installed), except that `.pcm` and `.raw` are
    headerless signed 16-bit little-endian mono at `sample_rate`. Channels are averaged; another
    rate is resampled with soxr (HQ).

    Raises `InputError` for a file that is missing, unreadable, not audio, empty, not finite, or
    raw with half a sample at its end.
    """
    path = Path(path)
    return decode_audio(read_recording(path), path, sample_rate)


def read_recording(path: Path) -> bytes:
    """The bytes of a recording; raises `InputError` if it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a path may have no bytes, or a zero among them
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{path}: cannot be read ({reason}); give a recording, such as a .wav file"
        ) from error


def decode_audio(data: bytes, path: Path, sample_rate: int) -> np.ndarray:
    """`load_audio` of the bytes that were read from `path`."""
    if is_headerless(path):
        return check_audio(_decode_raw(data, path), str(path))
    if find_demuxer(data):
        mono, file_rate = decode_compressed(data, str(path))
    else:
        samples, file_rate = _decode(whole_wav(data, str(path)), path)
        with np.errstate(invalid="ignore", over="ignore"):  # check_audio says it in one line
            mono = samples.mean(axis=1)
    samples = check_audio(mono, str(path))
    if file_rate == sample_rate:
        return samples
    resampled = soxr.resample(samples, file_rate, sample_rate, quality="HQ")
    return check_audio(resampled, f"{path} at {sample_rate} Hz")


def is_headerless(path: Path) -> bool:
    """Whether the file has no header, so that its suffix decides the format."""
    return path.suffix.lower() in (".pcm", ".raw")


def audio_error(error: Exception) -> str:
    """libsndfile's message, without the object that was read."""
    if isinstance(error, soundfile.LibsndfileError):
        return error.error_string.rstrip(".")
    return getattr(error, "strerror", None) or type(error).__name__


def encode_audio(audio: np.ndarray, sample_rate: int, suffix: str) -> bytes:
    """The bytes of a file named `suffix` (".wav", ...) that holds `audio`, clipped to [-1, 1].

    Args:
      audio: [num_samples] float or int16; 0 samples are allowed, and become one of silence in the
        formats that libsndfile writes no empty file of (flac, mp3, opus).
      sample_rate: in Hz; Opus takes 8, 12, 16, 24 and 48 kHz only.
      suffix: .wav and .flac (16 bit), .mp3, .ogg (Vorbis), .opus, .pcm and .raw (s16le).

    Raises `InputError` for audio that `check_audio` refuses otherwise, `OutputError` for an unknown
    suffix or a rate that the format does not have.
    """
    how = _format(suffix, suffix)
    samples = mono_float32(audio, "audio")
    try:
        return _encode(samples, sample_rate, how)
    except soundfile.LibsndfileError as error:
        raise OutputError(
            f"{suffix} cannot hold {sample_rate} Hz audio ({error.error_string}); use .wav"
        ) from error


def save_audio(path: str | os.PathLike[str], audio: np.ndarray, sample_rate: int) -> None:
    """Writes `audio` in the format of the path's suffix (see `encode_audio`), whole or not at all.

    A symbolic link stays, and its target is replaced; a pipe or device gets the bytes.

    Raises what `encode_audio` and `check_output` raise, and `OutputError` when writing fails; then
    an older file at `path` is unchanged.
    """
    path = Path(path)
    check_output(path)
    data = encode_audio(audio, sample_rate, path.suffix)
    with reporting(_failure(path)):
        write_output(path, data)


@contextlib.contextmanager
def open_audio(
    path: str | os.PathLike[str], sample_rate: int
) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that writes the next samples, float [n], to an audio file.

    They are written beside `path`, which is replaced when the block ends without an error. A pipe
    or device gets them at once if it is of plain samples (.wav, .pcm), and at the end otherwise.
    Raises what `save_audio` raises.
    """
    path = Path(path)
    check_output(path)
    how = _format(path.suffix, str(path))
    opened = _open_stream if is_stream(path) else _open_file
    with reporting(_failure(path)), opened(path, sample_rate, how) as write:
        yield write


@contextlib.contextmanager
def _open_stream(
    path: Path, sample_rate: int, how: _Format
) -> Iterator[Callable[[np.ndarray], None]]:
    descriptor = open_stream(path)
    try:
        if how.coding == "PCM_16" and how.container != "FLAC":
            write_all(descriptor, wav_header(sample_rate) if how.container == "WAV" else b"")
            yield lambda samples: write_all(descriptor, to_pcm(samples))
        else:
            chunks = [np.zeros(0, np.float32)]
            yield chunks.append
            write_all(descriptor, _encode(np.concatenate(chunks), sample_rate, how))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _open_file(
    path: Path, sample_rate: int, how: _Format
) -> Iterator[Callable[[np.ndarray], None]]:
    num_samples = 0
    with new_file(path) as temporary, _Sink(temporary, "r+") as sink:
        with soundfile.SoundFile(
            sink, "w", sample_rate, channels=1, format=how.container, subtype=how.coding
        ) as file:

            def write(samples: np.ndarray) -> None:
                nonlocal num_samples
                num_samples += len(samples)
                try:
                    file.write(_as_coded(samples, how))
                finally:
                    sink.check()  # it knows why libsndfile failed

            yield write
        sink.check()
        if not num_samples:  # some formats have no empty file
            temporary.write_bytes(encode_audio(np.zeros(0, np.float32), sample_rate, path.suffix))


class _Sink(io.FileIO):
    """A file for libsndfile that keeps the error of a failed write, which `check` raises."""

    _error: OSError | None = None

    def write(self, data: Any, /) -> int:
        left = memoryview(data)
        try:
            while left:
                left = left[super().write(left) :]
        except OSError as error:
            self._error = error
        return len(data)

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def to_pcm(samples: np.ndarray) -> bytes:
    """Float samples [n], clipped to [-1, 1], as signed 16-bit little-endian."""
    return _to_int16(samples).astype("<i2").tobytes()


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises `OutputError` if `save_audio` could not write `path`; leaves nothing behind.

    For use before minutes of generation: unknown suffix, a directory, a parent directory that is
    missing or not writable.
    """
    path = Path(path)
    _format(path.suffix, str(path))
    with reporting(_failure(path)):
        check_writable(path)


def check_format(suffix: str) -> None:
    """Raises `OutputError` if no format of audio has this suffix."""
    _format(suffix, suffix)


def _failure(path: Path) -> str:
    return f"{path}: cannot be written in directory {path.parent}"


def _format(suffix: str, name: str) -> _Format:
    if suffix.lower() not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise OutputError(f"{name}: unknown audio format {suffix!r}; use one of {known}")
    return _FORMATS[suffix.lower()]


def _decode(data: bytes, path: Path) -> tuple[np.ndarray, int]:
    """Decodes to float32 [num_samples, num_channels] and the rate in Hz."""
    try:
        with ForwardFile(io.BytesIO(data)) as file:
            if not MIN_RATE <= file.samplerate <= MAX_RATE:
                raise InputError(
                    f"{path}: its head says {file.samplerate} Hz, but recordings have {MIN_RATE} "
                    f"to {MAX_RATE} Hz; repair it"
                )
            blocks = [np.zeros((0, file.channels), np.float32), *read_blocks(file)]
            return np.concatenate(blocks), file.samplerate
    except soundfile.LibsndfileError as error:
        # To libsndfile, a file of 0 bytes has an unknown format.
        reason = audio_error(error) if data else "the file is empty"
        if what := mistaken_content(data[:256]):
            raise InputError(f"{path} is {what}") from error
        raise InputError(
            f"{path}: not readable as audio ({reason}); convert it to wav, flac, mp3, ogg or opus"
        ) from error


class ForwardFile(soundfile.SoundFile):
    """A file that is read from its beginning to its end.

    soundfile seeks after every block, which fails at the end of a stream of unknown length.
    """

    def seekable(self) -> bool:
        return False


def read_blocks(file: ForwardFile) -> Iterator[np.ndarray]:
    """Decodes a second after another, float32 [num_samples, num_channels], to the end of the file.

    The length in its head counts for nothing: streams, such as ffmpeg's FLAC, have none there.
    """
    while len(block := file.read(file.samplerate, "float32", always_2d=True)):
        yield _limit_overshoot(block, file.subtype)


def _limit_overshoot(samples: np.ndarray, coding: str) -> np.ndarray:
    """Decoded samples, whose peaks beyond full scale are cut where they are the decoder's own.

    Lossy codings make peaks of 2.6 of recordings that were cut at 1; samples that are stored as
    numbers have such peaks in another scale only.

    Args:
      coding: libsndfile's name.
    """
    return np.clip(samples, -MAX_PEAK, MAX_PEAK) if coding in _LOSSY else samples


def _decode_raw(data: bytes, path: Path) -> np.ndarray:
    """Decodes to int16 [num_samples]."""
    if len(data) % 2:
        raise InputError(
            f"{path}: {len(data)} bytes are not whole 16-bit samples; "
            f"{path.suffix} is headerless signed 16-bit mono, give another format its own suffix"
        )
    return np.frombuffer(data, "<i2")


def _to_int16(samples: np.ndarray) -> np.ndarray:
    # libsndfile multiplies by 32767, and divides by 32768 when reading: 16-bit audio would change
    # each time it is loaded and saved.
    scaled = np.rint(np.clip(samples, -1, 1) * INT16_SCALE)
    return np.minimum(scaled, INT16_SCALE - 1).astype(np.int16)


def _as_coded(samples: np.ndarray, how: _Format) -> np.ndarray:
    return _to_int16(samples) if how.coding == "PCM_16" else np.clip(samples, -1, 1)


def _encode(samples: np.ndarray, sample_rate: int, how: _Format) -> bytes:
    if not len(samples) and not how.holds_empty:
        samples = np.zeros(1, np.float32)
    samples = _as_coded(samples, how)
    buffer = io.BytesIO()
    with soundfile.SoundFile(
        buffer, "w", sample_rate, channels=1, format=how.container, subtype=how.coding
    ) as file:
        # One call with a long recording overflows the stack of libsndfile's Vorbis encoder.
        for start in range(0, len(samples), sample_rate):
            file.write(samples[start : start + sample_rate])
    return buffer.getvalue()
