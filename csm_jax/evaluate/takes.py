"""Takes: what a configuration has spoken, a recording and a line of JSON for each."""

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csm_jax.errors import InputError, OutputError
from csm_jax.io.files import locked, replace_file, reporting
from csm_jax.io.json_lines import add_line, read_lines, write_lines

TAKES, SETTINGS = "takes.jsonl", "settings.json"
# Notices of speech that did not come to its end, and of what the guard did so that it did.
CAP, GUARD_CUT = "cut", "guard_cut"
RESAMPLED, CONTINUED, ENDED = "resampled", "continued", "ended"


@dataclass(frozen=True)
class Take:
    """One line of `takes.jsonl`.

    Attributes:
      id: of the line of the prompts; the recording is `audio/ID.wav`.
      text: what was to be spoken.
      speaker, seed: of the request.
      prompt: the last recording of the context in the speaker's voice; None without one.
      frames: of the speech, without the end of speech.
      seconds: of the speech.
      notices: the kinds of the engine's notices.
      ended: whether the speech came to its end, and was not cut at a limit or by the guard.
      first_audio_seconds: from the submission to the first chunk; None without speech.
      real_time_factor: seconds from the submission to the end for a second of speech; the same.
      chunks: of the stream, without the first.
      chunks_in_time: those of them that were there when all earlier ones had been played.
      crc32: of the recording's file.
    """

    id: str
    text: str
    speaker: int
    seed: int
    prompt: str | None
    frames: int
    seconds: float
    notices: tuple[str, ...]
    ended: bool
    first_audio_seconds: float | None
    real_time_factor: float | None
    chunks: int
    chunks_in_time: int
    crc32: int

    @property
    def key(self) -> tuple[str, int]:
        """What figures belong to: the line and the recording."""
        return self.id, self.crc32


class TakeDirectory:
    """The directory of a configuration: `settings.json`, `takes.jsonl` and `audio/`."""

    def __init__(self, path: Path):
        self.path = path

    def recording(self, name: str) -> Path:
        """The path of a take's recording."""
        return self.path / "audio" / f"{name}.wav"

    @contextlib.contextmanager
    def writing(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Holds the directory of one writer, a new one or one with the same settings.

        Raises:
          BusyError: another process holds it.
          InputError: it was begun with other settings.
          OutputError: it cannot be written.
        """
        with reporting(f"{self.path} could not be written"):
            (self.path / "audio").mkdir(parents=True, exist_ok=True)
            with locked(self.path / "run"):
                self.check(settings)
                self._write(settings)
                # The rest of a line that was being written when the process was killed.
                write_lines(self.path / TAKES, read_lines(self.path / TAKES))
                yield

    def read(self) -> list[Take]:
        """All takes so far, in the order in which they were written.

        Raises:
          InputError: the file has other lines.
        """
        path = self.path / TAKES
        try:
            return [_as_take(line) for line in read_lines(path)]
        except (OSError, UnicodeDecodeError, TypeError, KeyError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error

    def settings(self) -> dict[str, Any]:
        """What the takes were spoken with. Raises `InputError`."""
        path = self.path / SETTINGS
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{self.path} has no takes: speak them first") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error

    def add(self, take: Take) -> None:
        """Adds a take whose recording is written. Raises `OutputError`."""
        with reporting(f"{self.path / TAKES} could not be written"):
            add_line(self.path / TAKES, dataclasses.asdict(take))

    def checksum(self, name: str) -> int:
        """The CRC-32 of a take's recording. Raises `OutputError` if it is gone."""
        try:
            return zlib.crc32(self.recording(name).read_bytes())
        except OSError as error:
            message = f"{self.recording(name)} cannot be read: {error.strerror}"
            raise OutputError(message) from error

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises `InputError` if the directory was begun with other settings."""
        if not (self.path / SETTINGS).is_file():
            return
        before = self.settings()
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                raise InputError(
                    f"{self.path} was begun with {name} {before.get(name)}, not "
                    f"{settings.get(name)}: use the same flags, or another --out"
                )

    def _write(self, settings: Mapping[str, Any]) -> None:
        data = json.dumps(settings, indent=2) + "\n"
        replace_file(self.path / SETTINGS, data.encode())


def _as_take(line: dict[str, Any]) -> Take:
    notices = tuple(line.pop("notices"))
    return Take(notices=notices, **line)
