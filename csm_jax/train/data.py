"""Reads manifests of recorded conversations, which are JSON lines, and reports their problems."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from csm_jax.errors import InputError
from csm_jax.io.script import parse_turn

ON_BAD = ("fail", "skip")
T = TypeVar("T")


@dataclass(frozen=True)
class RecordedTurn:
    """A turn of a conversation, with its recording.

    Attributes:
      text: transcript of `audio`.
      is_trainable: whether its audio may count in the loss; otherwise it is only context.
    """

    speaker: int
    text: str
    audio: Path
    is_trainable: bool


@dataclass(frozen=True)
class RecordedConversation:
    """A line of a manifest.

    Attributes:
      line: its number in the file, from 1.
    """

    line: int
    turns: tuple[RecordedTurn, ...]


@dataclass(frozen=True)
class Problem:
    """The reason why a line cannot be used."""

    line: int
    message: str


def read_conversations(path: Path) -> tuple[list[RecordedConversation], list[Problem]]:
    """Reads `[{"speaker": 0, "text": "...", "audio": "a.wav"}, ...]`, a conversation a line.

    Audio is relative to the file. A turn with `"train": false` is only context.

    Returns:
      The conversations without a problem, and the problems of the others.

    Raises:
      InputError: the file cannot be read, or is empty.
    """
    try:
        # Only a line feed ends a line: JSON allows other line ends of Unicode within a text.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data {path} cannot be read: {error}") from error
    found: list[RecordedConversation] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_parse(line, number, path.parent))
        except InputError as error:
            problems.append(Problem(number, str(error)))
    if not found and not problems:
        raise InputError(f"data {path} is empty: write a conversation a line")
    return found, problems


def _parse(text: str, line: int, directory: Path) -> RecordedConversation:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from error
    if not isinstance(values, list) or not values:
        raise InputError("not a list of turns")
    turns = collect_or_fail(
        lambda i: _parse_turn(values[i], f"turn {i + 1}", directory), len(values)
    )
    return RecordedConversation(line, tuple(turns))


def collect_or_fail(make: Callable[[int], T], count: int) -> list[T]:
    """`make` of every index, or one `InputError` with the messages of all that fail."""
    made: list[T] = []
    messages: list[str] = []
    for index in range(count):
        try:
            made.append(make(index))
        except InputError as error:
            messages.append(str(error))
    if messages:
        raise InputError("; ".join(messages))
    return made


def _parse_turn(values: Any, where: str, directory: Path) -> RecordedTurn:
    is_trainable = True
    if isinstance(values, dict):
        values = dict(values)
        is_trainable = values.pop("train", True)
    if not isinstance(is_trainable, bool):
        raise InputError(f"{where}: train is {is_trainable!r}, expected true or false")
    turn = parse_turn(values, where, directory)
    if not turn.text.strip():
        raise InputError(f"{where}: the text is empty, so the recording has no transcript")
    if turn.audio is None:
        raise InputError(f"{where}: field audio is missing")
    return RecordedTurn(turn.speaker, turn.text, turn.audio, is_trainable)


def report(
    path: Path,
    problems: Sequence[Problem],
    num_good: int,
    on_bad: str,
    warn: Callable[[str], object],
) -> None:
    """Passes every problem to `warn` as a line, in the order of the file.

    Args:
      num_good: conversations without a problem.
      on_bad: of `ON_BAD`.

    Raises:
      InputError: there are problems and `on_bad` is "fail", or no conversation is left.
    """
    for problem in sorted(problems, key=lambda problem: problem.line):
        warn(f"{path}, line {problem.line}: {problem.message}")
    if problems and on_bad == "fail":
        raise InputError(
            f"{len(problems)} of {num_good + len(problems)} conversations of {path} cannot be "
            "trained on, see above: correct them, or leave them out with --on_bad_data=skip"
        )
    if not num_good:
        raise InputError(f"{path} has no conversation to train on, see above")
