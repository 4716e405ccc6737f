"""Training data: recordings with transcripts in, conversations and problems out."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from csm_jax.errors import InputError
from csm_jax.io.script import parse_turn
from csm_jax.train.codes import Clip
from csm_jax.train.forms import Columns, find_columns, number_speakers, read_rows
from csm_jax.train.word_times import TimedWord, parse_words

ON_BAD = ("fail", "skip")
T = TypeVar("T")
_MAX_SPEAKERS_TOLD = 10


@dataclass(frozen=True)
class RecordedTurn:
    """A turn of a conversation, with its recording.

    Attributes:
      text: transcript of `audio`.
      is_trainable: whether its audio may count in the loss; otherwise it is only context.
      start, end: of the part of the file that it is, in seconds; None is that of the file.
      words: when its words are spoken; None if that is not known.
    """

    speaker: int
    text: str
    audio: Path
    is_trainable: bool
    start: float | None = None
    end: float | None = None
    words: tuple[TimedWord, ...] | None = None

    @property
    def source(self) -> Path | Clip:
        """The file, or the part of it."""
        if self.start is None and self.end is None:
            return self.audio
        return Clip(self.audio, self.start or 0.0, self.end)


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


def read_conversations(
    path: Path, tell: Callable[[str], object] = lambda message: None
) -> tuple[list[RecordedConversation], list[Problem]]:
    """Reads `[{"speaker": 0, "text": "...", "audio": "a.wav"}, ...]`, a conversation a line.

    Audio is relative to the file. A turn with `"train": false` is only context; one with `words`
    has their times (`word_times.py`). Other forms of data (`forms.py`) have a turn in each row,
    which is a conversation of its own.

    Args:
      tell: is given a line on what the data were taken for, unless they are conversations only.

    Returns:
      The conversations without a problem, and the problems of the others.

    Raises:
      InputError: the file cannot be read, or is empty.
    """
    form, directory, rows = read_rows(path)
    if not rows:
        raise InputError(f"data {path} is empty: write a conversation a line")
    try:
        columns = find_columns(values for _, values in rows)
    except InputError as error:
        raise InputError(f"data {path}: {error}") from error
    numbers = _number_speakers(rows, columns)
    if columns.used:
        tell(f"data {path}: {_describe(form, columns, numbers)}")
    found: list[RecordedConversation] = []
    problems: list[Problem] = []
    for number, values in rows:
        try:
            if isinstance(values, dict) and columns.used:
                turns = (_parse_row(values, columns.used, numbers, directory),)
            else:
                turns = _parse(values, directory)
            found.append(RecordedConversation(number, turns))
        except InputError as error:
            problems.append(Problem(number, str(error)))
    return found, problems


def _parse(values: Any, directory: Path) -> tuple[RecordedTurn, ...]:
    if isinstance(values, InputError):
        raise values
    if not isinstance(values, list) or not values:
        raise InputError("not a list of turns")
    return tuple(
        collect_or_fail(lambda i: _parse_turn(values[i], f"turn {i + 1}", directory), len(values))
    )


def _number_speakers(rows: Sequence[tuple[int, Any]], columns: Columns) -> dict[Any, int]:
    key = columns.used.get("speaker")
    given = [values[key] for _, values in rows if isinstance(values, dict) and key in values]
    return number_speakers(name for name in given if _is_name(name))


def _is_name(speaker: Any) -> bool:
    return isinstance(speaker, str | int | float) and not isinstance(speaker, bool)


def _describe(form: str, columns: Columns, numbers: Mapping[Any, int]) -> str:
    """What was recognized, as a sentence."""
    read = ", ".join(
        name if name == kind else f"{name} as {kind}" for kind, name in columns.used.items()
    )
    parts = [f"{form}, a turn each, with {read}"]
    if columns.ignored:
        parts.append(f"not read: {', '.join(columns.ignored)}")
    if named := [
        f"{name} is {number}" for name, number in numbers.items() if str(name) != str(number)
    ]:
        more = [f"and {len(named) - _MAX_SPEAKERS_TOLD} more"] * (len(named) > _MAX_SPEAKERS_TOLD)
        parts.append(f"speakers: {', '.join([*named[:_MAX_SPEAKERS_TOLD], *more])}")
    return "; ".join(parts)


def _parse_row(
    values: Mapping[str, Any], used: Mapping[str, str], numbers: Mapping[Any, int], directory: Path
) -> RecordedTurn:
    """The turn of a row of named values."""
    given = {kind: values.get(name) for kind, name in used.items()}
    start, end = (_seconds(given.pop(name, None), name) for name in ("start", "end"))
    if (duration := _seconds(given.pop("duration", None), "duration")) is not None and end is None:
        end = (start or 0) + duration
    if end is not None and end <= (start or 0):
        raise InputError(f"it ends at {end:g} s, where it has not begun")
    if isinstance(audio := given.get("audio"), dict):  # a column of the hub's type Audio
        given["audio"] = audio.get("path")
    speaker = given.get("speaker")
    if speaker is None:
        given["speaker"] = 0
    elif _is_name(speaker):
        given["speaker"] = numbers[speaker]
    turn = {kind: value for kind, value in given.items() if value is not None}
    parsed = _parse_turn(turn, "the row", directory)
    return dataclasses.replace(parsed, audio=_locate(parsed.audio), start=start, end=end)


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise InputError(f"{name} is {value!r}, but must be a number of seconds")
    return seconds


def _locate(path: Path) -> Path:
    """A recording by its name: LJSpeech leaves out its directory and its suffix."""
    places = (path, path.with_name(f"{path.name}.wav"), path.parent / "wavs" / f"{path.name}.wav")
    return next((place for place in places if place.is_file()), path)


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
    is_trainable, words = True, None
    if isinstance(values, dict):
        values = dict(values)
        is_trainable, words = values.pop("train", True), values.pop("words", None)
    if not isinstance(is_trainable, bool):
        raise InputError(f"{where}: train is {is_trainable!r}, expected true or false")
    turn = parse_turn(values, where, directory)
    if not turn.text.strip():
        raise InputError(f"{where}: the text is empty, so the recording has no transcript")
    if turn.audio is None:
        raise InputError(f"{where}: field audio is missing")
    timed = None if words is None else parse_words(words, turn.text, where, directory)
    return RecordedTurn(turn.speaker, turn.text, turn.audio, is_trainable, words=timed)


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
