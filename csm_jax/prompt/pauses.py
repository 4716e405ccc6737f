"""Marks of pauses in texts: `[pause:0.5s]`, `[pause:500ms]`, `[pause]`, `<break time="500ms"/>`.

They are read only where a request asks for it, because the reference speaks texts as they are.
"""

import re
from typing import NamedTuple

from csm_jax.errors import InputError

DEFAULT_SECONDS = 0.5
# Of all pauses of a text.
MAX_SECONDS = 60.0
_LENGTH = r"(\d{1,6}(?:\.\d{1,6})?)\s*(ms|s)"
MARK = re.compile(
    rf"\[pause(?:\s*:\s*{_LENGTH})?\]|<break(?:\s+time\s*=\s*[\"']{_LENGTH}[\"'])?\s*/>",
    re.IGNORECASE,
)


class Piece(NamedTuple):
    """A part of a text, and the seconds of silence after it."""

    text: str
    pause: float


class Pauses(NamedTuple):
    """A text with its pauses: seconds of silence at the beginning, and pieces to speak."""

    before: float
    pieces: list[Piece]

    @property
    def seconds(self) -> float:
        """The length of all pauses."""
        return self.before + sum(piece.pause for piece in self.pieces)

    @property
    def text(self) -> str:
        """What is spoken: the text without the marks."""
        return " ".join(piece.text for piece in self.pieces)


def split_pauses(text: str) -> Pauses:
    """Splits a text at its marks of pauses.

    Pauses of which only punctuation is between or behind are one pause: the mark in
    "Well [pause:1s]." is behind the full stop.

    Raises:
      InputError: the pauses are longer than `MAX_SECONDS`.
    """
    pieces: list[Piece] = []
    before, start = 0.0, 0
    for mark in [*MARK.finditer(text), None]:
        piece = text[start : mark.start() if mark else len(text)].strip()
        pause = _seconds(mark) if mark else 0.0
        if any(character.isalnum() for character in piece):
            pieces.append(Piece(piece, pause))
        elif pieces:
            last = pieces[-1]
            pieces[-1] = Piece(last.text + piece, last.pause + pause)
        else:
            before += pause
        start = mark.end() if mark else len(text)
    found = Pauses(before, pieces)
    if found.seconds > MAX_SECONDS:
        raise InputError(
            f"the pauses of the text are {found.seconds:g} s long, but at most {MAX_SECONDS:g} s "
            "are possible: make them shorter"
        )
    return found


def _seconds(mark: re.Match[str]) -> float:
    number, unit = (mark[1], mark[2]) if mark[1] else (mark[3], mark[4])
    if number is None:
        return DEFAULT_SECONDS
    return float(number) / (1000 if unit.lower() == "ms" else 1)
