"""Recordings out of requests: bounded while they are read, not after.

A compressed file of a few megabytes can unpack to gigabytes, so decoding stops where the limits
end. libsndfile does it: it opens nothing but what it is given.
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

from csm_jax.audio import SAMPLE_RATE, audio_error, check_speech
from csm_jax.errors import InputError, first_line
from csm_jax.serve.audio.ogg import OggError, checked_ogg
from csm_jax.serve.settings import Limits

MAX_CHANNELS = 8
MAX_RATE = 192_000
MIN_RATE = 4_000
# What is decoded at once.
_BLOCK_SECONDS = 1
# How the formats begin that are read here. libsndfile knows two dozen rare ones, whose readers are
# used and tested less; behind a tag it would look for any of them.
_BEGINNINGS = re.compile(rb"RIFF....WAVE|fLaC|OggS|\xff[\xe2-\xff]", re.DOTALL)
_TAGGED = re.compile(rb"fLaC|\xff[\xe2-\xff]", re.DOTALL)
# An ID3 tag: its size in 4 times 7 bits.
_TAG = re.compile(rb"ID3[\x02-\x04]..([\x00-\x7f]{4})", re.DOTALL)
# The same as libsndfile calls them.
_CONTAINERS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
# Lengths from here on stand in heads of files that were written as streams.
_UNKNOWN_FRAMES = 2**31


def decode(given: str | bytes, limits: Limits, name: str) -> np.ndarray:
    """`decode_recording` of a file, or of one in base64."""
    return decode_recording(_as_bytes(given, limits, name), limits, name)


def check(given: str | bytes, limits: Limits, name: str) -> None:
    """`check_head` of a file, or of one in base64."""
    check_head(_as_bytes(given, limits, name), limits, name)


def _as_bytes(given: str | bytes, limits: Limits, name: str) -> bytes:
    return decode_base64(given, limits, name) if isinstance(given, str) else given


def decode_base64(text: str, limits: Limits, name: str = "audio") -> bytes:
    """The bytes of base64, with or without `data:...;base64,` before it."""
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise InputError(f"{name}: a data URI must be data:audio/...;base64,...")
    # Four characters are three bytes; before decoding, which would take memory for all of it.
    if len(text) // 4 * 3 > limits.audio_bytes:
        raise InputError(_too_large(name, limits))
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: not base64 ({first_line(error)})") from error


def decode_recording(data: bytes, limits: Limits, name: str = "audio") -> np.ndarray:
    """A recording in WAV, FLAC, Ogg (Opus, Vorbis) or MP3 as mono float32 [num_samples] at 24 kHz.

    Raises:
      InputError: it is no audio, no speech (`check_speech`), or beyond a limit.
    """
    with _opened(data, limits, name) as file:
        samples = _read(file, limits, name)
        rate = file.samplerate
    if not len(samples) or not np.isfinite(samples).all():
        raise InputError(f"{name}: no samples, or some that are not finite")
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE)
    return check_speech(samples, name)


def check_head(data: bytes, limits: Limits, name: str = "audio") -> None:
    """What can be said of a recording without decoding it. Raises `InputError`."""
    with _opened(data, limits, name) as file:
        if limits.audio_seconds * file.samplerate < file.frames < _UNKNOWN_FRAMES:
            raise InputError(_too_long(name, limits))


@contextlib.contextmanager
def _opened(data: bytes, limits: Limits, name: str) -> Iterator[soundfile.SoundFile]:
    """Raises `InputError` for bytes that are no audio, or of a kind that is not read here."""
    if len(data) > limits.audio_bytes:
        raise InputError(_too_large(name, limits))
    if not _is_known(data):
        raise InputError(_not_readable(name))
    try:
        if data.startswith(b"OggS"):
            data = checked_ogg(data)
        with soundfile.SoundFile(io.BytesIO(data)) as file:
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
    """Whether a file begins as those that are read here, if need be after an ID3 tag."""
    if not (tag := _TAG.match(data)):
        return _BEGINNINGS.match(data) is not None
    size = functools.reduce(lambda size, byte: size << 7 | byte, tag[1])
    return _TAGGED.match(data, tag.end() + size) is not None


def _read(file: soundfile.SoundFile, limits: Limits, name: str) -> np.ndarray:
    """Mono float32 at the file's own rate."""
    most = int(limits.audio_seconds * file.samplerate)
    blocks, total = [], 0
    # What the head says of the length may be a lie: what comes is counted.
    while len(block := file.read(_BLOCK_SECONDS * file.samplerate, "float32", always_2d=True)):
        total += len(block)
        if total > most:
            raise InputError(_too_long(name, limits))
        with np.errstate(invalid="ignore", over="ignore"):
            blocks.append(block.mean(axis=1))
    return np.concatenate([np.zeros(0, np.float32), *blocks])


def _not_readable(name: str) -> str:
    return f"{name}: not readable as audio; send WAV, FLAC, Ogg or MP3"


def _too_large(name: str, limits: Limits) -> str:
    return f"{name}: more than {limits.audio_bytes} bytes; compress or cut it"


def _too_long(name: str, limits: Limits) -> str:
    return f"{name}: longer than {limits.audio_seconds:g} s; cut it"
