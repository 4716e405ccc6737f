"""Manifests of conversations: JSON lines in, what can be learnt from out, and what is wrong."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from csm_jax import cli
from csm_jax.errors import InputError
from csm_jax.script import Turn, parse_turn

ON_BAD = ("fail", "skip")
T = TypeVar("T")


@dataclass(frozen=True)
class Conversation:
    """A line of a manifest.

    Attributes:
      line: its number in the file, from 1.
      turns: each with its recording.
      learnt: whether each turn is to be learnt; the others are only heard.
    """

    line: int
    turns: tuple[Turn, ...]
    learnt: tuple[bool, ...]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line."""

    line: int
    message: str


def read_conversations(path: Path) -> tuple[list[Conversation], list[Problem]]:
    """Reads `[{"speaker": 0, "text": "...", "audio": "a.wav"}, ...]`, a conversation a line.

    Audio is relative to the file. A turn with `"train": false` is heard, but not learnt.

    Returns:
      The conversations without a fault, and the faults of the others.

    Raises:
      InputError: the file cannot be read, or is empty.
    """
    try:
        # Only a line feed ends a line: JSON allows other line ends of Unicode within a text.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data {path} cannot be read: {error}") from error
    found: list[Conversation] = []
    problems = []
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


def _parse(text: str, line: int, directory: Path) -> Conversation:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from error
    if not isinstance(values, list) or not values:
        raise InputError("not a list of turns")
    parsed = each_or_all_faults(
        lambda i: _parse_turn(values[i], f"turn {i + 1}", directory), len(values)
    )
    turns, learnt = zip(*parsed, strict=True)
    return Conversation(line, turns, learnt)


def each_or_all_faults(make: Callable[[int], T], count: int) -> list[T]:
    """What `make` makes of every turn, or one `InputError` with the faults of all."""
    made, faults = [], []
    for index in range(count):
        try:
            made.append(make(index))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    return made


def _parse_turn(values: Any, where: str, directory: Path) -> tuple[Turn, bool]:
    learnt = True
    if isinstance(values, dict):
        values = dict(values)
        learnt = values.pop("train", True)
    if not isinstance(learnt, bool):
        raise InputError(f"{where}: train is {learnt!r}, expected true or false")
    turn = parse_turn(values, where, directory)
    if not turn.text.strip():
        raise InputError(f"{where}: the text is empty, so the recording has no transcript")
    if turn.audio is None:
        raise InputError(f"{where}: field audio is missing")
    return turn, learnt


def report(path: Path, problems: Sequence[Problem], num_good: int, on_bad: str) -> None:
    """Says what is wrong with the data, a line each.

    Args:
      num_good: conversations that can be learnt from.
      on_bad: of `ON_BAD`.

    Raises:
      InputError: something is, and may not be left out; or nothing is left.
    """
    for problem in sorted(problems, key=lambda problem: problem.line):
        cli.warn(f"{path}, line {problem.line}: {problem.message}")
    if problems and on_bad == "fail":
        raise InputError(
            f"{len(problems)} of {num_good + len(problems)} conversations of {path} cannot be "
            "learnt from, see above: mend them, or leave them out with --on_bad_data=skip"
        )
    if not num_good:
        raise InputError(f"{path} has nothing that can be learnt from, see above")
