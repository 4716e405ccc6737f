"""Voices by name: a recording, its transcript and its speaker number, in a directory.

`NAME.flac` (or .wav, .mp3, .ogg, .opus) with `NAME.txt`, the transcript. A first line `speaker: 1`
says the number; without it, it is 0.
"""

import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from csm_jax.audio import SAMPLE_RATE, encode_audio, load_audio
from csm_jax.errors import InputError
from csm_jax.files import make_directory, replace_file
from csm_jax.generator import Generator
from csm_jax.prompt import Segment

logger = logging.getLogger("csm_jax.serve")

SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus")
# What a voice may be called: it becomes a file's name.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SPEAKER = re.compile(r"speaker:\s*(-?\d+)\s*\n", re.IGNORECASE)


@dataclass(frozen=True)
class Voice:
    """Attributes:
    text: transcript of `audio`.
    audio: float32 [num_samples] at 24 kHz.
    codes: int32 [num_frames, Q], the same encoded.
    is_own: whether it was added here and may be deleted.
    """

    name: str
    speaker: int
    text: str
    audio: np.ndarray
    codes: np.ndarray
    is_own: bool

    def turn(self, speaker: int | None = None) -> Segment:
        """What a conversation begins with for `speaker` to have this voice."""
        number = self.speaker if speaker is None else speaker
        return Segment(number, self.text, codes=self.codes)


class Voices:
    """Presets that are there, and those that are added. Safe for many threads."""

    def __init__(self, model: Generator, presets: list[Path], own: Path | None, most: int = 64):
        """Args:
          presets: directories to read; later ones win.
          own: where voices are added, and read from too; None keeps them in memory.
          most: voices there may be.

        Raises:
          InputError: a preset cannot be used.
        """
        self._model = model
        self._own = own
        self._most = most
        self._lock = threading.Lock()
        self._voices: dict[str, Voice] = {}
        for directory in presets:
            self._read(directory, is_own=False)
        if own is not None:
            make_directory(own)
            self._read(own, is_own=True)

    def all(self, owner: str) -> list[Voice]:
        """Everybody's voices and those of `owner`, sorted by name."""
        with self._lock:
            return sorted(self._voices.values(), key=lambda voice: voice.name)

    def find(self, name: str, owner: str) -> Voice:
        """Everybody's voice or one of `owner`; raises `InputError` if there is none."""
        with self._lock:
            found = self._voices.get(name)
            known = ", ".join(sorted(self._voices)) or "none"
        if found is None:
            raise InputError(f"there is no voice {name[:80]!r}; known: {known}")
        return found

    def find_as(self, name: str, owner: str, known_names: Sequence[str]) -> Voice | None:
        """The voice of a name, or what stands for one that an API's clients know.

        Of `known_names` the first is the first voice there is, and so on; None where there is none.

        Raises:
          InputError: it is neither.
        """
        if self.has(name, owner) or name not in known_names:
            return self.find(name, owner)
        voices = self.all(owner)
        return voices[known_names.index(name) % len(voices)] if voices else None

    def has(self, name: str, owner: str) -> bool:
        with self._lock:
            return name in self._voices

    def add(self, owner: str, name: str, speaker: int, text: str, audio: np.ndarray) -> Voice:
        """Adds or replaces a voice of one's own: float32 [num_samples] at 24 kHz.

        Raises:
          InputError: the name cannot be used, or there are too many.
        """
        check_name(name)
        voice = self._make(name, speaker, text, audio, is_own=True)
        with self._lock:
            old = self._voices.get(name)
            if old is not None and not old.is_own:
                raise InputError(f"voice {name} is a preset, and stays: choose another name")
            if old is None and len(self._voices) >= self._most:
                raise InputError(f"there are {self._most} voices already: delete one first")
            self._write(voice)
            self._voices[name] = voice
        return voice

    def delete(self, owner: str, name: str) -> None:
        """Raises `InputError` if there is no such voice of one's own."""
        voice = self.find(name, owner)
        if not voice.is_own:
            raise InputError(f"voice {name} is a preset, and stays")
        with self._lock:
            self._voices.pop(name, None)
            if self._own is not None:
                for suffix in (".txt", *SUFFIXES):
                    (self._own / f"{name}{suffix}").unlink(missing_ok=True)

    def _read(self, directory: Path, is_own: bool) -> None:
        for path in sorted(directory.iterdir()):
            if path.suffix.lower() not in SUFFIXES or not _NAME.fullmatch(path.stem):
                continue
            transcript = path.with_suffix(".txt")
            if not transcript.is_file():
                logger.warning("%s is no voice without its transcript, %s", path, transcript)
                continue
            speaker, text = _parse(transcript.read_text(encoding="utf-8"))
            audio = load_audio(path, SAMPLE_RATE)
            self._voices[path.stem] = self._make(path.stem, speaker, text, audio, is_own)

    def _make(self, name: str, speaker: int, text: str, audio: np.ndarray, is_own: bool) -> Voice:
        if not text.strip():
            raise InputError(f"voice {name}: the transcript is empty")
        codes = self._model.codec.encode(audio, self._model.config.num_codebooks)
        return Voice(name, speaker, text.strip(), audio, codes, is_own)

    def _write(self, voice: Voice) -> None:
        if self._own is None:
            return
        # The transcript last: a recording without one is no voice.
        data = encode_audio(voice.audio, SAMPLE_RATE, ".flac")
        replace_file(self._own / f"{voice.name}.flac", data)
        text = f"speaker: {voice.speaker}\n{voice.text}\n"
        replace_file(self._own / f"{voice.name}.txt", text.encode())


def check_name(name: str) -> None:
    """Raises `InputError` for what cannot be a voice's name."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"a voice cannot be called {name[:80]!r}: 1 to 64 letters, digits, - and _ make a name"
        )


def _parse(transcript: str) -> tuple[int, str]:
    """The speaker number and the text of a transcript file."""
    if head := _SPEAKER.match(transcript):
        return int(head[1]), transcript[head.end() :]
    return 0, transcript
