"""The forms that people keep recordings and transcripts in, as rows of named values.

| form | a row is |
|---|---|
| JSON lines | a conversation, a list of turns; or an object, a turn of its own |
| a JSON document | a list of these |
| CSV with a header | a turn; separated by commas, semicolons, tabs or bars |
| lines with bars | `file|text`, `file|speaker|text` or, as LJSpeech, `file|text|normalized text` |
| a directory | its `metadata.csv` or `.jsonl`; else pairs, `x.wav` and `x.txt` or `x.lab` |

The names of values are those of the usual data sets: see `NAMES`.
"""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csm_jax.errors import InputError
from csm_jax.io.compressed import SUFFIXES as COMPRESSED_SUFFIXES
from csm_jax.io.text import read_text

# What a value is called in data sets of the hub, Common Voice, NeMo and others; the first that a
# row has counts.
NAMES = {
    "audio": ("audio", "path", "file", "file_name", "filename", "audio_path", "audio_file"),
    "text": ("text", "sentence", "transcript", "transcription", "normalized_text"),
    "speaker": ("speaker", "speaker_id", "client_id", "source"),
    "start": ("start", "start_time", "offset"),
    "end": ("end", "end_time"),
    "duration": ("duration",),  # from the start, as in NeMo's manifests
    "train": ("train",),
}
NAMES["audio"] += ("audio_filepath", "wav")
# The fields of a turn of a conversation.
_OF_TURNS = ("speaker", "text", "audio", "train")
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.json", "metadata.tsv", "metadata.txt")
# Of `x.wav`, in the order in which they are looked for.
_TRANSCRIPTS = (".txt", ".lab", ".normalized.txt")
# Columns of parts in other units or by other names, which would be trained on as a whole.
_PARTS = re.compile(r"(?:^|_)(?:start|begin|onset|offset|end|stop)(?:$|_)", re.IGNORECASE)
_NO_TEXT = (".parquet", ".arrow", ".xlsx", ".xls", ".ods", ".zip", ".tar", ".gz", ".sqlite", ".db")
_RECORDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus", *COMPRESSED_SUFFIXES)


class Rows(NamedTuple):
    """The content of a file or directory of training data.

    Attributes:
      form: what it was taken for, to tell the user.
      directory: recordings are relative to it.
      rows: the number of each row, its line where there are lines, and what it holds: a list of
        turns, an object of named values, or the reason why it cannot be read.
    """

    form: str
    directory: Path
    rows: list[tuple[int, Any]]


def read_rows(path: Path) -> Rows:
    """Reads training data in any of the forms.

    Raises:
      InputError: it cannot be read, or a directory has no recordings.
    """
    if path.is_dir():
        return _read_directory(path)
    if path.suffix.lower() in _NO_TEXT:
        raise InputError(
            f"data {path}: {path.suffix} is not read; write its rows as JSON lines or CSV, with "
            "the recordings in files of their own"
        )
    text = read_text(path, f"data {path}")
    if "\n" not in text:  # the line ends of old spreadsheets
        text = text.replace("\r", "\n")
    # Only a line feed ends a line: JSON allows other line ends of Unicode within a text.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        form, rows = _parse(text, lines)
    except csv.Error as error:
        raise InputError(f"data {path} is no CSV that can be read: {error}") from error
    if form is None:
        raise InputError(
            f"data {path}: its first line is neither JSON, nor the header of a CSV file with a "
            "column for recordings and one for texts (such as audio,text), nor file|text"
        )
    return Rows(form, path.parent, rows)


def _parse(text: str, lines: Sequence[tuple[int, str]]) -> tuple[str | None, list[tuple[int, Any]]]:
    """The form of a text, and its rows; None if it is none of them."""
    first = lines[0][1].strip() if lines else ""
    if first.startswith(("[", "{")):
        document = _load(text)
        if isinstance(document, list) and (len(lines) > 1 or _has_rows(document)):
            return "a JSON list", list(enumerate(document, 1))
        return "JSON lines", [(number, _load(line)) for number, line in lines]
    if delimiter := _find_delimiter(first):
        text = text[text.index(first) :]
        before = lines[0][0] - 1
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        return "CSV with a header", [(before + rows.line_num, _named(row)) for row in rows]
    for separator in "|\t":
        if separator in first:
            return _parse_bars(lines, separator)
    return (None, []) if lines else ("JSON lines", [])


def _has_rows(values: list[Any]) -> bool:
    """Whether the items of a list in one line are rows, and not the turns of a conversation."""
    names = {name for item in values if isinstance(item, dict) for name in item}
    known = {name for each in NAMES.values() for name in each}
    return all(isinstance(item, list) for item in values) or bool(names & (known - {*_OF_TURNS}))


def _load(text: str) -> Any:
    """The value of a JSON text, or the error that it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON: {error}")


def _find_delimiter(header: str) -> str | None:
    """What separates the columns of a header; None if it does not name recordings and texts."""
    for delimiter in ",;\t|":
        columns = {
            column.strip().lower() for column in next(csv.reader([header], delimiter=delimiter))
        }
        if columns & {*NAMES["audio"]} and columns & {*NAMES["text"]}:
            return delimiter
    return None


def _named(row: dict[str | None, Any]) -> dict[str, str] | InputError:
    """A row of a CSV file without its empty values, or why it cannot be read."""
    if None in row:  # DictReader's name of what is too much
        return InputError("more values than the header has: put quotes around a text with commas")
    return {key.strip(): value for key, value in row.items() if key and value}


def _parse_bars(
    lines: Sequence[tuple[int, str]], separator: str
) -> tuple[str, list[tuple[int, Any]]]:
    rows = [(number, [each.strip() for each in line.split(separator)]) for number, line in lines]
    widths = {len(row) for _, row in rows}
    has_speakers = widths == {3} and _are_speakers([row[1:] for _, row in rows])
    columns = ("file", "speaker", "text") if has_speakers else ("file", "text")
    if widths == {3} and not has_speakers:
        columns = ("file", "", "text")  # LJSpeech: numbers are written out in the last column
    form = f"lines of {'|'.join(column or 'text as written' for column in columns)}"
    shown = {"\t": "a tab"}.get(separator, separator)
    problem = InputError(f"{len(columns)} values with {shown} between them are expected")
    return form, [
        (number, dict(zip(columns, row, strict=True)) if len(row) == len(columns) else problem)
        for number, row in rows
    ]


def _are_speakers(columns: Sequence[Sequence[str]]) -> bool:
    """Whether the first of two columns has speakers, and not the texts of the second as written."""
    if all(speaker.isdecimal() for speaker, _ in columns):
        return True
    names = [speaker for speaker, _ in columns]
    return not any(" " in name for name in names) and any(" " in text for _, text in columns)


def _read_directory(path: Path) -> Rows:
    for name in _METADATA:
        if (path / name).is_file():
            return read_rows(path / name)
    recordings = sorted(each for each in path.iterdir() if each.suffix.lower() in _RECORDINGS)
    if not recordings:
        inside = [str(each) for each in sorted(path.iterdir()) if _has_data(each)]
        raise InputError(
            f"data {path} has neither {', '.join(_METADATA)} nor recordings: name "
            + (" or ".join(inside) or "a file, or a directory of pairs such as a.wav and a.txt")
        )
    return Rows("pairs of a recording and a .txt", path, list(enumerate(map(_pair, recordings), 1)))


def _has_data(path: Path) -> bool:
    """Whether `_read_directory` would read this directory."""
    return path.is_dir() and any(
        each.name in _METADATA or each.suffix.lower() in _RECORDINGS for each in path.iterdir()
    )


def _pair(recording: Path) -> Any:
    names = [recording.with_suffix(suffix) for suffix in _TRANSCRIPTS]
    transcript = next((name for name in names if name.is_file()), names[0])
    try:
        return {"audio": recording.name, "text": read_text(transcript).strip()}
    except InputError as error:
        return error


class Columns(NamedTuple):
    """Which values of rows are read, by what they are, and which are not."""

    used: dict[str, str]
    ignored: list[str]


def find_columns(rows: Iterable[Any]) -> Columns:
    """The columns of all rows that are objects.

    Raises:
      InputError: one of them seems to be of parts of recordings, but is not read.
    """
    seen = dict.fromkeys(itertools.chain.from_iterable(r for r in rows if isinstance(r, dict)))
    by_lower = {name.lower(): name for name in reversed([*seen])}
    used = {}
    for kind, names in NAMES.items():
        found = [by_lower[name] for name in names if name in by_lower]
        if found:
            used[kind] = found[0]
    if "start" not in used:
        used.pop("duration", None)  # of the whole recording
    ignored = [name for name in seen if name and name not in used.values()]
    if parts := [name for name in ignored if _PARTS.search(name)]:
        raise InputError(
            f"column {parts[0]} is not read, but seems to say which part of a recording is meant: "
            "give start and end, in seconds, or remove it"
        )
    return Columns(used, ignored)


def number_speakers(names: Iterable[Any]) -> dict[Any, int]:
    """A number for each speaker: its own, or its place if one of them has no number."""
    distinct = list(dict.fromkeys(names))
    numbers = [_as_number(name) for name in distinct]
    if all(number is not None for number in numbers):
        return dict(zip(distinct, numbers, strict=True))  # pyright: ignore[reportReturnType] none is None
    return {name: place for place, name in enumerate(distinct)}


def _as_number(name: Any) -> int | None:
    if isinstance(name, str) and name.strip().removeprefix("-").isdecimal():
        return int(name)
    if isinstance(name, int | float) and math.isfinite(name) and name == int(name):
        return int(name)
    return None
