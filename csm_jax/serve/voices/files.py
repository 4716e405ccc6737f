"""Voices as files: a recording `NAME.flac`, or of another suffix, and `NAME.txt`, its transcript.

A first line `speaker: 1` in the transcript sets the speaker number, which is 0 by default. A file
that cannot be used is skipped and logged, because one bad voice must not prevent the server from
starting. A recording without a transcript is used, and logged too: the model speaks less well.
"""

import logging
import mimetypes
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from csm_jax.errors import InputError, first_line
from csm_jax.io.compressed import SUFFIXES as COMPRESSED_SUFFIXES
from csm_jax.io.text import decode_text
from csm_jax.serve.audio.decoding import decode_recording
from csm_jax.serve.settings import Limits

logger = logging.getLogger("csm_jax.serve")

SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus", *COMPRESSED_SUFFIXES)
MAX_SPEAKER = 2**31 - 1
_MAX_NAME = 64
# Longer numbers are not int32, and Python converts very long ones slowly or not at all.
_SPEAKER = re.compile(r"speaker:[ \t]*(-?\d+)[ \t]*\r?\n", re.IGNORECASE)
_MAX_DIGITS = 10
_BYTES_PER_CHARACTER = 4
# Of one directory; further ones are skipped.
_MAX_VOICES = 1000


@dataclass(frozen=True)
class VoiceFile:
    """A recording and its transcript.

    Attributes:
      text: transcript of `audio`; "" without one.
      audio: float32 [num_samples] at 24 kHz.
    """

    name: str
    speaker: int
    text: str
    audio: np.ndarray


def check_name(name: str) -> str:
    """The name of a voice with accents as Unicode composes them (NFC).

    Raises:
      InputError: it is not a valid name.
    """
    composed = unicodedata.normalize("NFC", name)
    if not _is_name(composed):
        raise InputError(
            f"a voice cannot be called {name[:80]!r}: 1 to 64 letters, digits, spaces, - _ and . "
            "make a name, which begins with a letter or digit, and does not end with a space or ."
        )
    return composed


def _is_name(name: str) -> bool:
    if not 0 < len(name) <= _MAX_NAME:
        return False
    # The first letters of Unicode's categories; in many scripts marks are parts of letters.
    kinds = [unicodedata.category(character)[0] for character in name]
    is_valid = [kind in "LNM" or each in " -_." for kind, each in zip(kinds, name, strict=True)]
    return all(is_valid) and kinds[0] in "LN" and name[-1] not in " ."


def read_voices(directory: Path, limits: Limits) -> Iterator[VoiceFile]:
    """Reads the valid voices of a directory, sorted by file name.

    Raises:
      InputError: the directory cannot be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        message = (
            f"{str(directory)!r} cannot be read ({error.strerror}): name a directory of voices"
        )
        raise InputError(message) from error
    recordings = [directory / name for name in names if _is_recording(Path(name))]
    found: dict[str, str] = {}
    if len(recordings) > _MAX_VOICES:
        logger.warning("%r: only the first %d voices are read", str(directory), _MAX_VOICES)
    for path in recordings[:_MAX_VOICES]:
        try:
            voice = _read_voice(path, limits)
            if (other := found.setdefault(voice.name, path.name)) != path.name:
                raise InputError(f"{other} has the same name")
            yield voice
        except InputError as error:
            logger.warning("%r is left out: %s", str(path), error)


def check_transcript(text: str, limits: Limits) -> str:
    """The transcript without surrounding space. Raises `InputError` if it cannot be used."""
    text = text.strip()
    if not text:
        raise InputError("the transcript is empty")
    if len(text) > limits.text_characters:
        raise InputError(
            f"the transcript has {len(text)} characters, but at most {limits.text_characters} "
            "are read"
        )
    return text


def _is_recording(path: Path) -> bool:
    """Whether a file is meant as a voice. Hidden ones are not: macOS adds `._NAME` to each."""
    if path.name.startswith("."):
        return False
    kind = mimetypes.guess_type(path.name)[0] or ""
    return path.suffix.lower() in SUFFIXES or kind.startswith("audio/")


def _read_voice(path: Path, limits: Limits) -> VoiceFile:
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"recordings are {', '.join(SUFFIXES)}: convert it")
    name = check_name(path.stem)
    speaker, text = _read_transcript(path.with_suffix(".txt"), limits)
    audio = decode_recording(_read_file(path, limits.audio_bytes), limits, "the recording")
    return VoiceFile(name, speaker, text, audio)


def _read_transcript(path: Path, limits: Limits) -> tuple[int, str]:
    """The speaker number and the transcript, which is "" if the file is missing."""
    if not os.path.lexists(path):
        logger.warning("%r is missing: the voice is used without its transcript", str(path))
        return 0, ""
    speaker, text = _parse(_read_text(path, limits))
    return speaker, check_transcript(text, limits)


def _read_text(path: Path, limits: Limits) -> str:
    data = _read_file(path, _BYTES_PER_CHARACTER * limits.text_characters + 100)
    return decode_text(data, path.name)


def _read_file(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file. A link is followed if it stays inside the directory."""
    try:
        target = path.resolve(strict=True)
        if not target.is_relative_to(path.parent.resolve()):
            raise InputError(
                f"{path.name} is a link that leads out of the directory: copy the file"
            )
        # Reading a pipe would block, and opening a device can have side effects.
        if not stat.S_ISREG(target.stat().st_mode):
            raise InputError(f"{path.name} is not a regular file")
        with open(os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise InputError(f"{path.name} is missing") from error
    except (OSError, RuntimeError) as error:  # Python's own error for links that loop
        raise InputError(f"{path.name} cannot be read ({first_line(error)})") from error
    if len(data) > max_bytes:
        raise InputError(f"{path.name} has more than {max_bytes} bytes")
    return data


def _parse(transcript: str) -> tuple[int, str]:
    """The speaker number and the text of a transcript file."""
    head = _SPEAKER.match(transcript)
    if head is None:
        return 0, transcript
    digits = head[1]
    if len(digits) > _MAX_DIGITS or not 0 <= int(digits) <= MAX_SPEAKER:
        raise InputError(f"speaker {digits[:20]} is no number from 0 to {MAX_SPEAKER}")
    return int(digits), transcript[head.end() :]
