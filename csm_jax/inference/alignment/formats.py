"""Word times as files: JSON, subtitles (SRT and WebVTT) and Praat's TextGrid."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from csm_jax.errors import InputError
from csm_jax.inference.alignment.words import Word
from csm_jax.io.files import reporting
from csm_jax.io.outputs import check_writable, write_output

# A subtitle has at most so many characters, and ends at a pause of so many seconds.
_LONGEST_LINE, _PAUSE_SECONDS = 42, 0.7
_SENTENCE_END = (".", "!", "?", "…", "。", "！", "？")  # noqa: RUF001


def write_words(path: Path, words: Sequence[Word], seconds: float) -> None:
    """Writes words in the format that the file's name ends in.

    Args:
      seconds: duration of the speech.

    Raises:
      InputError: the name ends in no known format.
      OutputError: the file cannot be written.
    """
    data = format_for(path)(words, seconds).encode()
    with reporting(f"{path} could not be written"):
        write_output(path, data)


def check_words_out(path: Path) -> None:
    """Raises `InputError` or `OutputError` if `write_words` could not write `path`."""
    format_for(path)
    with reporting(f"{path} cannot be written"):
        check_writable(path)


def format_for(path: Path) -> Callable[[Sequence[Word], float], str]:
    """The format of a file by its name. Raises `InputError` if it ends in no known one."""
    found = {name.lower(): name for name in FORMATS}.get(path.suffix.lower())
    if found is None:
        raise InputError(f"{path} ends in none of {', '.join(FORMATS)}: rename it")
    return FORMATS[found]


def word_rows(words: Sequence[Word]) -> list[dict[str, Any]]:
    """{"text", "start", "end", "confidence"} of each word, in seconds; a word that is not spoken
    has confidence 0."""
    return [
        {
            "text": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "confidence": round(word.confidence, 3),
        }
        for word in words
    ]


def to_json(words: Sequence[Word], seconds: float) -> str:
    """A list of `word_rows`."""
    return json.dumps(word_rows(words), ensure_ascii=False, indent=1) + "\n"


def to_srt(words: Sequence[Word], seconds: float) -> str:
    """Subtitles of a line each, as SubRip has them."""
    cues = [
        f"{number}\n{_time(line[0].start, ',')} --> {_time(line[-1].end, ',')}\n{_text(line)}\n"
        for number, line in enumerate(_lines(words), 1)
    ]
    return "\n".join(cues)


def to_vtt(words: Sequence[Word], seconds: float) -> str:
    """Subtitles of a line each, as WebVTT has them, with the time of each word inside."""
    cues = [
        f"{_time(line[0].start, '.')} --> {_time(line[-1].end, '.')}\n{_timed_text(line)}\n"
        for line in _lines(words)
    ]
    return "\n".join(["WEBVTT\n", *cues])


def to_textgrid(words: Sequence[Word], seconds: float) -> str:
    """A TextGrid with one tier, `words`; silence is an interval without text."""
    intervals = list(_intervals(words, seconds))
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {seconds:.6f}",
        "tiers? <exists>",
        "size = 1",
        "item []:",
        "    item [1]:",
        '        class = "IntervalTier"',
        '        name = "words"',
        "        xmin = 0",
        f"        xmax = {seconds:.6f}",
        f"        intervals: size = {len(intervals)}",
    ]
    for number, (start, end, text) in enumerate(intervals, 1):
        escaped = text.replace('"', '""')
        lines += [
            f"        intervals [{number}]:",
            f"            xmin = {start:.6f}",
            f"            xmax = {end:.6f}",
            f'            text = "{escaped}"',
        ]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Sequence[Word], float], str]] = {
    ".json": to_json,
    ".srt": to_srt,
    ".vtt": to_vtt,
    ".TextGrid": to_textgrid,
}


def _lines(words: Sequence[Word]) -> Iterator[list[Word]]:
    """Words that are shown together: no longer than a line, up to a pause or an end."""
    line: list[Word] = []
    for word in (word for word in words if word.spoken):
        if line and _begins_line(line, word):
            yield line
            line = []
        line.append(word)
    if line:
        yield line


def _begins_line(line: Sequence[Word], word: Word) -> bool:
    return (
        len(_text([*line, word])) > _LONGEST_LINE
        or word.start - line[-1].end > _PAUSE_SECONDS
        or line[-1].text.endswith(_SENTENCE_END)
    )


def _text(line: Sequence[Word]) -> str:
    return " ".join(word.text for word in line)


def _timed_text(line: Sequence[Word]) -> str:
    def escape(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

    first, *rest = line
    times = [f"<{_time(word.start, '.')}>{escape(word.text)}" for word in rest]
    return " ".join([escape(first.text), *times])


def _time(seconds: float, point: str) -> str:
    """hh:mm:ss and milliseconds."""
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def _intervals(words: Sequence[Word], seconds: float) -> Iterator[tuple[float, float, str]]:
    """Starts, ends and texts that fill the whole speech without gaps."""
    spoken = [word for word in words if word.spoken and word.end > word.start]
    edges = [0.0, *itertools.chain.from_iterable((word.start, word.end) for word in spoken)]
    for word, before in zip(spoken, edges[::2], strict=False):
        if word.start > before:
            yield before, word.start, ""
        yield word.start, word.end, word.text
    if edges[-1] < seconds:
        yield edges[-1], seconds, ""
