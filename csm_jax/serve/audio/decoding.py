"""Decodes recordings of requests within limits.

A compressed file of a few megabytes can unpack to gigabytes, so the limits apply during decoding.
libsndfile decodes, because it never opens other files or URLs; what it has not is decoded by
`io/compressed.py`, which keeps ffmpeg from doing so.
"""

import base64
import binascii
import contextlib
import functools
import io
import re
from collections.abc import Iterator

import numpy as np
import soundfile
import soxr

from csm_jax.errors import InputError, first_line
from csm_jax.io.audio import ForwardFile, audio_error, read_blocks
from csm_jax.io.av_decoder import MAX_CHANNELS, MAX_RATE, MIN_RATE
from csm_jax.io.compressed import decode_compressed, find_demuxer
from csm_jax.io.samples import SAMPLE_RATE, check_speech
from csm_jax.io.wav import whole_wav
from csm_jax.serve.audio.ogg import OggError, checked_ogg
from csm_jax.serve.settings import Limits

# The first bytes of the accepted formats. libsndfile also reads two dozen rare ones, whose decoders
# are tested less, and it would look for any of them behind a tag.
_SIGNATURES = re.compile(rb"RIFF....WAVE|fLaC|OggS|\xff[\xe2-\xff]", re.DOTALL)
_SIGNATURES_AFTER_TAG = re.compile(rb"fLaC|\xff[\xe2-\xff]", re.DOTALL)
# An ID3 tag: its size in 4 times 7 bits.
_TAG = re.compile(rb"ID3[\x02-\x04]..([\x00-\x7f]{4})", re.DOTALL)
# The names of these formats in libsndfile.
_CONTAINERS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
# Files that were written as streams have a length of at least this in their heads.
_UNKNOWN_FRAMES = 2**31


def decode_upload(upload: str | bytes, limits: Limits, name: str) -> np.ndarray:
    """Decodes a recording, a file or base64, as `decode_recording` does."""
    return decode_recording(_as_bytes(upload, limits, name), limits, name)


def check_upload(upload: str | bytes, limits: Limits, name: str) -> None:
    """Checks a recording, a file or base64, as `check_head` does."""
    check_head(_as_bytes(upload, limits, name), limits, name)


def _as_bytes(upload: str | bytes, limits: Limits, name: str) -> bytes:
    return decode_base64(upload, limits, name) if isinstance(upload, str) else upload


def decode_base64(text: str, limits: Limits, name: str = "audio") -> bytes:
    """Decodes base64, with or without `data:...;base64,` before it."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise InputError(f"{name}: a data URI must be data:audio/...;base64,...")
    # Checked before decoding, which takes memory: four characters are three bytes.
    if len(text) // 4 * 3 > limits.audio_bytes:
        raise InputError(_too_large(name, limits))
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: not base64 ({first_line(error)})") from error


def decode_recording(data: bytes, limits: Limits, name: str = "audio") -> np.ndarray:
    """Decodes a recording to mono float32 [num_samples] at 24 kHz.

    It may be WAV, FLAC, Ogg (Opus, Vorbis) or MP3, or what `find_demuxer` knows: M4A, WebM, AAC.

    Raises:
      InputError: it is not audio, not speech (`check_speech`), or beyond a limit.
    """
    if _is_compressed(data, limits, name):
        samples, rate = decode_compressed(data, name, limits.audio_seconds)
    else:
        with _open_audio(data, limits, name) as file:
            samples, rate = _read(file, limits, name), file.samplerate
    if not len(samples) or not np.isfinite(samples).all():
        raise InputError(f"{name}: no samples, or some that are not finite")
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE)
    return check_speech(samples, name)


def check_head(data: bytes, limits: Limits, name: str = "audio") -> None:
    """Checks a recording as far as possible without decoding it. Raises `InputError`."""
    if _is_compressed(data, limits, name):
        decode_compressed(data, name, limits.audio_seconds)
        return
    with _open_audio(data, limits, name) as file:
        if limits.audio_seconds * file.samplerate < file.frames < _UNKNOWN_FRAMES:
            raise InputError(_too_long(name, limits))


def _is_compressed(data: bytes, limits: Limits, name: str) -> bool:
    """Whether `io/compressed.py` decodes a recording. Raises `InputError` for too large a one."""
    if len(data) > limits.audio_bytes:
        raise InputError(_too_large(name, limits))
    return find_demuxer(data) is not None


@contextlib.contextmanager
def _open_audio(data: bytes, limits: Limits, name: str) -> Iterator[ForwardFile]:
    """Opens a file. Raises `InputError` for bytes that are not audio in an accepted format."""
    if not _is_known(data):
        raise InputError(_not_readable(name))
    try:
        if data.startswith(b"OggS"):
            data = checked_ogg(data)
        with ForwardFile(io.BytesIO(whole_wav(data, name))) as file:
            if file.format not in _CONTAINERS:
                raise InputError(_not_readable(name))
            if not (1 <= file.channels <= MAX_CHANNELS and MIN_RATE <= file.samplerate <= MAX_RATE):
                raise InputError(
                    f"{name}: {file.channels} channels at {file.samplerate} Hz, but at most "
                    f"{MAX_CHANNELS} at {MIN_RATE} to {MAX_RATE} can be read"
                )
            yield file
    except OggError as error:
        raise InputError(f"{name}: not readable as audio ({error})") from error
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(f"{name}: not readable as audio ({audio_error(error)})") from error


def _is_known(data: bytes) -> bool:
    """Whether a file has the signature of an accepted format, possibly after an ID3 tag."""
    if not (tag := _TAG.match(data)):
        return _SIGNATURES.match(data) is not None
    size = functools.reduce(lambda size, byte: size << 7 | byte, tag[1])
    return _SIGNATURES_AFTER_TAG.match(data, tag.end() + size) is not None


def _read(file: ForwardFile, limits: Limits, name: str) -> np.ndarray:
    """Decodes to mono float32 at the file's own rate."""
    most = int(limits.audio_seconds * file.samplerate)
    blocks, total = [], 0
    # The samples are counted, because the length in the head can be wrong.
    for block in read_blocks(file):
        total += len(block)
        if total > most:
            raise InputError(_too_long(name, limits))
        with np.errstate(invalid="ignore", over="ignore"):
            blocks.append(block.mean(axis=1))
    return np.concatenate([np.zeros(0, np.float32), *blocks])


def _not_readable(name: str) -> str:
    return f"{name}: not readable as audio; send WAV, FLAC, Ogg or MP3, M4A, WebM or AAC"


def _too_large(name: str, limits: Limits) -> str:
    return f"{name}: more than {limits.audio_bytes} bytes; compress or cut it"


def _too_long(name: str, limits: Limits) -> str:
    return f"{name}: longer than {limits.audio_seconds:g} s; cut it"
