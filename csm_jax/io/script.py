"""Script files: a conversation as a JSON list of turns."""

import json
from dataclasses import dataclass
from pathlib import Path

from csm_jax.errors import InputError
from csm_jax.io.text import read_text

_FIELDS = {"speaker": int, "text": str, "audio": str}


@dataclass(frozen=True)
class Turn:
    """A turn to speak or, with `audio`, a recorded one."""

    speaker: int
    text: str
    audio: Path | None = None


def read_script(path: Path) -> list[Turn]:
    """Reads a script, `[{"speaker": 0, "text": "...", "audio": "a.wav"}, ...]`.

    `audio` is optional, and relative to the file.

    Raises:
      InputError: the file or one of its turns is malformed; the turn is named by its number.
    """
    text = read_text(path, f"script {path}")
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"script {path} is not JSON: {error}") from error
    if not isinstance(turns, list) or not turns:
        raise InputError(f"script {path} is not a JSON list of turns")
    parsed = [parse_turn(turn, f"{path}, turn {i}", path.parent) for i, turn in enumerate(turns, 1)]
    if all(turn.audio for turn in parsed):
        raise InputError(f"script {path} has nothing to speak: every turn has audio")
    return parsed


def parse_turn(turn: object, where: str, directory: Path) -> Turn:
    """Checks and converts the JSON of a turn.

    Args:
      where: its place in the file, for messages.
      directory: the audio is relative to it.

    Raises:
      InputError: it is malformed.
    """
    if not isinstance(turn, dict):
        raise InputError(f"{where}: expected an object with speaker and text")
    unknown = sorted(turn.keys() - _FIELDS.keys())
    if unknown:
        raise InputError(f"{where}: unknown field {unknown[0]}; known are {', '.join(_FIELDS)}")
    for name in ("speaker", "text"):
        if name not in turn:
            raise InputError(f"{where}: field {name} is missing")
    for name, value in turn.items():
        # bool is an int to Python, but no speaker.
        if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
            raise InputError(f"{where}: {name} is {value!r}, expected {_FIELDS[name].__name__}")
    audio = directory / turn["audio"] if "audio" in turn else None
    return Turn(turn["speaker"], turn["text"], audio)
