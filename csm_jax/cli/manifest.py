"""Manifests: a request on each line of a JSON Lines file, and an audio file for each.

    {"text": "Hello.", "id": "greeting", "speaker": 0, "seed": 1, "temperature": 0.8,
     "context": [{"speaker": 0, "text": "Before.", "audio": "before.wav"}]}

Only "text" is required. Lines whose file exists are skipped, so that the same command continues an
interrupted run.
"""

import dataclasses
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.cli.dataclass_flags import field_types
from csm_jax.errors import CSMError, InputError
from csm_jax.inference.alignment.formats import write_words
from csm_jax.inference.engine import Engine
from csm_jax.inference.generator import Generator
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request import Notice, Request
from csm_jax.inference.request_state import RequestState
from csm_jax.inference.voice import Voice
from csm_jax.io.audio import load_audio, save_audio
from csm_jax.io.samples import is_silent
from csm_jax.io.script import Turn, parse_turn
from csm_jax.io.text import read_text
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.normalizing import normalize_text
from csm_jax.prompt.turns import Segment, check_text
from csm_jax.watermark import Watermark

_NUMBER = (int, float)
_JsonType = type | tuple[type, ...]


def _json_types(cls: type, names: Iterable[str] | None = None) -> dict[str, _JsonType]:
    """The JSON types of fields of a dataclass; None is all of them."""
    kinds = field_types(cls)
    return {n: _NUMBER if kinds[n] is float else kinds[n] for n in names or kinds}


_REQUEST_FIELDS: dict[str, _JsonType] = {
    "text": str,
    "id": str,
    **_json_types(
        Request, ("speaker", "seed", "max_audio_length_ms", "guard", "best_of", "context_seconds")
    ),
    "context": list,
}
_SAMPLING_FIELDS = _json_types(Sampling)
_TYPE_NAMES = {str: "text", int: "a whole number", _NUMBER: "a number", bool: "true or false"}
# Bytes. The limit of file systems is 255, with the suffix.
_MAX_NAME_LENGTH = 240
# Recordings whose codes are kept: many lines have the same voice as context.
_MAX_CACHED_RECORDINGS = 64


@dataclass(frozen=True)
class Line:
    """One line of a manifest.

    Attributes:
      where: file and line, for messages.
      name: of its audio file, without the suffix.
      request: without the context.
      context: turns whose recordings are read when the line is spoken.
    """

    where: str
    name: str
    request: Request
    context: Sequence[Turn]


def with_voice(lines: Sequence[Line], voice: Voice | None) -> list[Line]:
    """The lines, spoken with a voice."""
    return [
        dataclasses.replace(line, request=dataclasses.replace(line.request, voice=voice))
        for line in lines
    ]


@dataclass(frozen=True)
class LineFiles:
    """The files of the lines of a manifest.

    Attributes:
      suffix: of the speech, such as ".wav".
      words_suffix: of the words with their times, such as ".srt"; None writes none.
      watermark: what marks the speech; None leaves it as it is.
    """

    directory: Path
    suffix: str
    words_suffix: str | None = None
    watermark: Watermark | None = None

    def speech(self, line: Line) -> Path:
        """The file of a line's speech."""
        return self.directory / f"{line.name}{self.suffix}"

    def words(self, line: Line) -> Path | None:
        """The file of its words."""
        if self.words_suffix is None:
            return None
        return self.directory / f"{line.name}{self.words_suffix}"

    def exist(self, line: Line) -> bool:
        """Whether all files of a line are there."""
        words = self.words(line)
        return self.speech(line).exists() and (words is None or words.exists())


def _read_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from error


# Reads the fields of a line from its text; raises `InputError` with what is wrong.
ReadFields = Callable[[str], object]


def read_manifest(
    path: Path,
    default: Request,
    normalize: bool = False,
    read_fields: ReadFields = _read_json,
) -> list[Line]:
    """Reads and checks a manifest.

    Args:
      default: the values of the fields that a line does not have.
      normalize: whether texts are spoken as `normalize_text` makes them.
      read_fields: reads a line; by default its JSON.

    Raises:
      InputError: the file or one of its lines is malformed; the line is named by its number.
    """
    # Only a line feed ends a line: JSON allows other line ends of Unicode within a text.
    texts = read_text(path, f"manifest {path}").split("\n")
    numbered = [(number, text) for number, text in enumerate(texts, 1) if text.strip()]
    if not numbered:
        raise InputError(f"manifest {path} has no lines")
    digits = len(str(numbered[-1][0]))

    def parse(number: int, text: str) -> Line:
        where = f"{path}, line {number}"
        fields = _read_fields(text, where, read_fields)
        return _parse(fields, where, f"{number:0{digits}}", path.parent, default)

    lines = [parse(number, text) for number, text in numbered]
    _check_names(lines)
    return [_normalized(line) for line in lines] if normalize else lines


def _normalized(line: Line) -> Line:
    try:
        text = normalize_text(line.request.text)
        return dataclasses.replace(
            line, request=dataclasses.replace(line.request, text=text, pauses=True)
        )
    except InputError as error:
        raise InputError(f"{line.where}: {error}") from error


def check_lines(model: Generator, lines: Sequence[Line]) -> None:
    """Raises `InputError` for the first line that this model cannot speak even without context.

    Its text takes too many positions, or its maximum length is less than a frame.
    """
    for line in lines:
        try:
            RequestState(model, line.request)
        except InputError as error:
            raise InputError(f"{line.where}: {error}") from error


def speak_manifest(
    model: Generator,
    lines: Sequence[Line],
    files: LineFiles,
    max_batch: int,
    warn: Callable[[str], None],
    progress: Callable[[int], object] = lambda num_lines: None,
) -> list[str]:
    """Speaks the lines that do not have all their files yet, several at once.

    Args:
      files: a file appears when its line is finished.
      max_batch: rows of the batch. It has as many for the last line too, so that an interrupted
        run gives the same files as an uninterrupted one.
      warn: called with each notice of a line.
      progress: called with the number of lines that are finished, in their order; first with the
        number of those that are skipped.

    Returns:
      A message for each line that has failed.
    """
    left = [line for line in lines if not files.exist(line)]
    progress(len(lines) - len(left))
    if not left:
        return []
    failed = []
    # Twice the batch: some threads encode context or write files while others wait for speech.
    with ThreadPoolExecutor(2 * max_batch) as workers, Engine(model, max_batch) as engine:
        speak = functools.partial(_speak, engine, Recordings(model), files)
        for line, (notices, error) in zip(left, workers.map(speak, left), strict=True):
            for notice in notices:
                warn(f"{line.where}: {notice.message}")
            if error is not None:
                failed.append(f"{line.where}: {error}")
            progress(1)
    return failed


def _speak(
    engine: Engine, recordings: "Recordings", files: LineFiles, line: Line
) -> tuple[list[Notice], CSMError | None]:
    try:
        context = [recordings.segment(turn) for turn in line.context]
        request = dataclasses.replace(line.request, context=context)
        ticket = engine.submit(request, stream=False, wait=True)
        speech = ticket.speech()
        audio, rate = speech.audio, speech.sample_rate
        if files.watermark is not None:
            audio = files.watermark.embed(audio, rate)
        save_audio(files.speech(line), audio, rate)
        if words_file := files.words(line):
            write_words(words_file, speech.words, len(audio) / rate)
    except CSMError as error:
        return [], error
    return [*recordings.notices(line.context), *ticket.notices], None


class Recordings:
    """The codes of context recordings; one that several lines name is encoded once.

    Its methods can be called from any thread.
    """

    def __init__(self, model: LoadedModel):
        self._lock = threading.Lock()
        self._codes = functools.lru_cache(_MAX_CACHED_RECORDINGS)(functools.partial(_encode, model))
        self._silent: set[Path] = set()

    def segment(self, turn: Turn) -> Segment:
        """The turn with the codes of its recording. Raises `InputError`."""
        if turn.audio is None:
            return Segment(turn.speaker, turn.text)
        with self._lock:
            codes, is_silent = self._codes(turn.audio)
            if is_silent:
                self._silent.add(turn.audio)
        return Segment(turn.speaker, turn.text, codes=codes)

    def notices(self, turns: Iterable[Turn]) -> list[Notice]:
        """What should be known of the recordings of these turns."""
        return [
            Notice("silent_context", f"{turn.audio} is silent: record it louder")
            for turn in turns
            if turn.audio in self._silent
        ]


def _encode(model: LoadedModel, path: Path) -> tuple[np.ndarray, bool]:
    """The codes of a recording, and whether it is silent."""
    audio = load_audio(path, model.sample_rate)
    return model.encode(audio), is_silent(audio)


def _read_fields(text: str, where: str, read_fields: ReadFields) -> dict[str, Any]:
    try:
        values = read_fields(text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object with text")
    _check_fields(values, where)
    return values


def _parse(
    values: dict[str, Any], where: str, name: str, directory: Path, default: Request
) -> Line:
    name = _checked_name(values.pop("id", name), where)
    turns = values.pop("context", [])
    context = [
        _parse_context(turn, f"{where}, turn {i}", directory) for i, turn in enumerate(turns, 1)
    ]
    sampling = {field: values.pop(field) for field in _SAMPLING_FIELDS if field in values}
    try:
        sampled = dataclasses.replace(default.sampling, **sampling)
        request = dataclasses.replace(default, sampling=sampled, **values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return Line(where, name, request, context)


def _parse_context(turn: object, where: str, directory: Path) -> Turn:
    parsed = parse_turn(turn, where, directory)
    try:
        check_text(parsed.text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if parsed.audio is not None and not parsed.audio.is_file():
        raise InputError(f"{where}: context audio {parsed.audio} does not exist")
    return parsed


def _check_fields(values: dict[str, Any], where: str) -> None:
    known = _REQUEST_FIELDS | _SAMPLING_FIELDS
    if unknown := sorted(values.keys() - known.keys()):
        raise InputError(f"{where}: unknown field {unknown[0]}; known are {', '.join(known)}")
    if "text" not in values:
        raise InputError(f"{where}: field text is missing")
    for name, value in values.items():
        kind = known[name]
        # bool is a subclass of int.
        is_right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not is_right or (kind in (int, _NUMBER) and not _is_finite(value)):
            expected = _TYPE_NAMES.get(kind, "a list of turns")
            raise InputError(f"{where}: {name} is {_short(value)}, expected {expected}")


def _is_finite(value: float) -> bool:
    """False for NaN and Infinity, which Python's JSON accepts, and for an int beyond all floats."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _checked_name(name: str, where: str) -> str:
    """Raises `InputError` unless a name is that of a file in the directory."""
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(f"{where}: id is {name!r}, but it names a file: no path, no leading dot")
    try:
        num_bytes = len(os.fsencode(name))
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: id is {name!r}, which is no Unicode") from error
    if num_bytes > _MAX_NAME_LENGTH:
        raise InputError(
            f"{where}: id is {num_bytes} bytes long, but names a file: at most {_MAX_NAME_LENGTH}"
        )
    return name


def _check_names(lines: Sequence[Line]) -> None:
    seen: dict[str, str] = {}
    for line in lines:
        if line.name in seen:
            raise InputError(f"{line.where}: {line.name} is the name of {seen[line.name]} too")
        seen[line.name] = line.where
