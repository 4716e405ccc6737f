"""Voices by name: shared voices from files, and voices that owners have added.

Shared voices are read-only, and owners cannot add voices with their names. If a shared voice later
gets the name of an added one, the owner of the added voice keeps using that.
"""

import io
import logging
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from csm_jax.errors import InputError, first_line
from csm_jax.inference.generator import Generator
from csm_jax.io.audio import encode_audio
from csm_jax.io.samples import SAMPLE_RATE
from csm_jax.prompt.turns import Segment
from csm_jax.serve.settings import Limits
from csm_jax.serve.store.voices import VoiceRow, VoiceStore
from csm_jax.serve.voices.files import check_name, check_transcript, read_voices

logger = logging.getLogger("csm_jax.serve")


@dataclass(frozen=True)
class Voice:
    """A voice: a recording with its transcript, which becomes the first turn of a prompt.

    Attributes:
      text: transcript of the recording; "" if there is none.
      seconds: length of the recording.
      codes: int32 [num_frames, Q], the recording encoded.
      owner: None for a shared voice.
    """

    name: str
    speaker: int
    text: str
    seconds: float
    codes: np.ndarray
    owner: str | None

    @property
    def is_own(self) -> bool:
        """Whether it was added, and can be deleted."""
        return self.owner is not None

    def turn(self, speaker: int | None = None) -> Segment:
        """The turn of context that gives this voice to `speaker`, by default its own number."""
        number = self.speaker if speaker is None else speaker
        return Segment(number, self.text or None, codes=self.codes)


class Voices:
    """All voices of a server. Thread-safe: only changes wait for one another."""

    def __init__(
        self,
        model: Generator,
        presets: Sequence[Path],
        store: VoiceStore,
        limits: Limits,
    ):
        """Reads all voices; those that cannot be used are skipped and logged.

        Args:
          presets: directories of shared voices; later ones take precedence.

        Raises:
          InputError: a directory cannot be read.
          StorageError: the store cannot be read.
        """
        self._model = model
        self._store = store
        self._limits = limits
        # For changes, which replace the dictionary: readers never wait for the store.
        self._changing = threading.Lock()
        self._shared: dict[str, Voice] = {}
        self._recordings: dict[str, bytes] = {}
        self._own: dict[tuple[str, str], Voice] = {}
        for directory in presets:
            for file in read_voices(directory, limits):
                data = encode_audio(file.audio, SAMPLE_RATE, ".flac")
                self._recordings[file.name] = data
                self._shared[file.name] = self._make(None, file.name, file.speaker, file.text, data)
        self._load()

    def visible_to(self, owner: str) -> list[Voice]:
        """The shared voices and those of `owner`, sorted by name."""
        own = {name: voice for (owned_by, name), voice in self._own.items() if owned_by == owner}
        known = self._shared | own
        return [known[name] for name in sorted(known)]

    def all(self) -> list[Voice]:
        """The shared voices and those of all owners."""
        return [*self._shared.values(), *self._own.values()]

    def find(self, name: str, owner: str) -> Voice:
        """A voice of `owner`, or a shared one, by its name in any case.

        Raises:
          InputError: there is none, or there are several in other cases than that of `name`.
        """
        if found := self._own.get((owner, name)) or self._shared.get(name):
            return found
        similar = self._similar(name, owner)
        if len(similar) > 1:
            names = " or ".join(voice.name for voice in similar)
            raise InputError(f"voice {name[:80]!r} can be {names}: write it as it is listed")
        if not similar:
            known = ", ".join(voice.name for voice in self.visible_to(owner)) or "none"
            raise InputError(f"there is no voice {name[:80]!r}; known: {known}")
        return similar[0]

    def _similar(self, name: str, owner: str) -> list[Voice]:
        """The voices whose names differ at most in case, or in how accents are written."""
        wanted = _fold(name)
        return [voice for voice in self.visible_to(owner) if _fold(voice.name) == wanted]

    def find_api_voice(self, name: str, owner: str, known_names: Sequence[str]) -> Voice | None:
        """The voice of a name, or the substitute for a name that an API's clients use.

        The first of `known_names`, which are lower case, stands for the first shared voice, and so
        on, so that adding a voice changes no other. Without shared voices they stand for those of
        the owner, and without any voices the result is None.

        Raises:
          InputError: there is no voice of that name, and it is not one of `known_names`.
        """
        if name.casefold() not in known_names or self._similar(name, owner):
            return self.find(name, owner)
        voices = [self._shared[each] for each in sorted(self._shared)] or self.visible_to(owner)
        return voices[known_names.index(name.casefold()) % len(voices)] if voices else None

    def has(self, name: str, owner: str) -> bool:
        """Whether there is a voice of exactly this name."""
        return (owner, name) in self._own or name in self._shared

    def recording(self, voice: Voice) -> bytes:
        """The recording as a FLAC file. Raises `InputError` if the voice has been deleted."""
        if voice.owner is None:
            return self._recordings[voice.name]
        if (row := self._store.find(voice.owner, voice.name)) is None:
            raise InputError(f"voice {voice.name} was deleted")
        return row.recording

    def add(self, owner: str, name: str, speaker: int, text: str, audio: np.ndarray) -> Voice:
        """Adds or replaces a voice of an owner: float32 [num_samples] at 24 kHz.

        Raises:
          InputError: the name or the transcript cannot be used.
          QuotaError: there are too many.
          StorageError: it cannot be stored.
        """
        name = check_name(name)
        if name in self._shared and (owner, name) not in self._own:
            raise InputError(f"voice {name} is a preset, and stays: choose another name")
        text = check_transcript(text, self._limits) if text.strip() else ""
        data = encode_audio(audio, SAMPLE_RATE, ".flac")
        voice = self._make(owner, name, speaker, text, data)
        # The lock keeps memory and store consistent when a name is added twice at once.
        with self._changing:
            self._store.put(VoiceRow(owner, name, speaker, text, data))
            self._own = {**self._own, (owner, name): voice}
        return voice

    def delete(self, owner: str, name: str) -> None:
        """Removes a voice of an owner. Raises `InputError` if there is no such voice."""
        if (owner, name) not in self._own:
            # Raises another error if there is no such voice at all.
            raise InputError(f"voice {self.find(name, owner).name} is a preset, and stays")
        with self._changing:
            self._store.delete(owner, name)
            self._own = {key: voice for key, voice in self._own.items() if key != (owner, name)}

    def _load(self) -> None:
        for owner, name in self._store.names():
            if (row := self._store.find(owner, name)) is None:
                continue
            try:
                self._own[owner, name] = self._make(*row)
            except InputError as error:
                logger.warning("added voice %s is left out: %s", name, error)
            if name in self._shared:
                logger.warning("added voice %s hides the shared one from its owner", name)

    def _make(self, owner: str | None, name: str, speaker: int, text: str, data: bytes) -> Voice:
        """Encodes a FLAC file, as it is stored, so that a restart gives the same codes."""
        try:
            audio, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        except (soundfile.LibsndfileError, OSError) as error:
            raise InputError(f"its recording is damaged ({first_line(error)})") from error
        codes = self._model.codec.encode(audio, self._model.config.num_codebooks)
        return Voice(name, speaker, text, len(audio) / SAMPLE_RATE, codes, owner)


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
