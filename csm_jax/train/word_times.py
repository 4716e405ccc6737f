"""Word times of a recording, as `csm_jax.align` writes them: JSON, or a file of it."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from csm_jax.errors import InputError
from csm_jax.inference.alignment.words import word_spans
from csm_jax.io.text import read_text

_FIELDS = {"text", "start", "end", "confidence"}


class TimedWord(NamedTuple):
    """A word, and the seconds of the recording in which it is spoken; none if both are equal."""

    text: str
    start: float
    end: float


def parse_words(values: Any, text: str, where: str, directory: Path) -> tuple[TimedWord, ...]:
    """Checks and converts the words of a turn.

    Args:
      values: `[{"text": "Hi.", "start": 0.1, "end": 0.4}, ...]`, or the name of a file of that.
      text: of the turn; it consists of these words (`inference.alignment.words.word_spans`).
      where: the place of the turn, for messages.
      directory: the file is relative to it.

    Raises:
      InputError: they are malformed, or not the words of the text.
    """
    if isinstance(values, str):
        where = f"{where}: {directory / values}"
        values = _read(directory / values, where)
    if not isinstance(values, list):
        raise InputError(f"{where}: words are {_short(values)}, expected a list or a file's name")
    words = tuple(_parse(value, f"{where}: word {i}") for i, value in enumerate(values, 1))
    wanted = [text[start:end] for start, end in word_spans(text)]
    if len(words) != len(wanted):
        raise InputError(f"{where}: there are {len(words)} words, but {len(wanted)} in the text")
    for number, (word, expected) in enumerate(zip(words, wanted, strict=True), 1):
        if word.text != expected:
            raise InputError(
                f"{where}: word {number} is {word.text!r}, but {expected!r} in the text"
            )
    return words


def _read(path: Path, where: str) -> Any:
    content = read_text(path, where)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error


def _parse(value: Any, where: str) -> TimedWord:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with text, start and end")
    if unknown := sorted(value.keys() - _FIELDS):
        raise InputError(f"{where}: unknown field {unknown[0]}")
    for name in ("text", "start", "end"):
        if name not in value:
            raise InputError(f"{where}: field {name} is missing")
    text, start, end = value["text"], value["start"], value["end"]
    if not isinstance(text, str):
        raise InputError(f"{where}: text is {_short(text)}, expected str")
    for name, seconds in (("start", start), ("end", end)):
        if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
            raise InputError(f"{where}: {name} is {_short(seconds)}, expected seconds from 0")
    if end < start:
        raise InputError(f"{where}: it ends at {end:g} s, before it starts at {start:g} s")
    return TimedWord(text, float(start), float(end))


def _short(value: Any) -> str:
    return repr(value)[:40]
