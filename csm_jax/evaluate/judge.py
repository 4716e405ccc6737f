"""The second phase: judges measure the takes.

Each kind of judge has a file of JSON lines beside `takes.jsonl`, so that one can be added or
replaced later. A line is valid for one judge and one recording.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.evaluate.judges import QualityModel, Recognizer, SpeakerEncoder
from csm_jax.evaluate.normalization import Normalize
from csm_jax.evaluate.takes import Take, TakeDirectory
from csm_jax.evaluate.word_errors import count_errors
from csm_jax.io.audio import load_audio
from csm_jax.io.files import locked, reporting
from csm_jax.io.json_lines import add_line, read_lines, write_lines
from csm_jax.io.samples import SAMPLE_RATE

WORDS, SIMILARITY, QUALITY = "words", "similarity", "quality"

# The figures of a take; its recording is float32 [n] at `SAMPLE_RATE`.
Measure = Callable[[Take, np.ndarray], dict[str, Any]]


@dataclass(frozen=True)
class Judge:
    """A judge that is loaded.

    Attributes:
      kind: `WORDS`, `SIMILARITY` or `QUALITY`.
      name: as the flag has it, with whatever else changes its figures.
      measure: the figures of a take.
    """

    kind: str
    name: str
    measure: Measure


def word_judge(name: str, recognize: Recognizer, normalize: Normalize) -> Judge:
    """A judge of words: transcript, `WordErrors`, and the two lists of words that they count."""

    def measure(take: Take, audio: np.ndarray) -> dict[str, Any]:
        transcript = recognize(audio, SAMPLE_RATE) if len(audio) else ""
        reference, heard = normalize(take.text), normalize(transcript)
        return {
            "transcript": transcript,
            "reference": " ".join(reference),
            "heard": " ".join(heard),
            **asdict(count_errors(reference, heard)),
        }

    return Judge(WORDS, name, measure)


def similarity_judge(name: str, encode: SpeakerEncoder) -> Judge:
    """A judge of the voice: the cosine of the embeddings of a take and its prompt."""
    prompts: dict[str, np.ndarray] = {}

    def measure(take: Take, audio: np.ndarray) -> dict[str, Any]:
        if take.prompt is None or not len(audio):
            return {"similarity": None}
        if take.prompt not in prompts:
            recording = load_audio(take.prompt, SAMPLE_RATE)
            prompts[take.prompt] = encode(recording, SAMPLE_RATE)
        return {"similarity": _cosine(prompts[take.prompt], encode(audio, SAMPLE_RATE))}

    return Judge(SIMILARITY, name, measure)


def quality_judge(name: str, score: QualityModel) -> Judge:
    """A judge of quality."""

    def measure(_: Take, audio: np.ndarray) -> dict[str, Any]:
        return {"quality": score(audio, SAMPLE_RATE) if len(audio) else None}

    return Judge(QUALITY, name, measure)


def judge_takes(
    directory: TakeDirectory,
    takes: Sequence[Take],
    judge: Judge,
    siblings: Sequence[TakeDirectory] = (),
    progress: Callable[[int], object] = lambda num_takes: None,
) -> None:
    """Measures the takes that the judge has not measured yet.

    Args:
      siblings: configurations with the same prompts. Of takes that are the same there, such as
        those that no guard has changed, the figures are copied.
      progress: called with the number of finished takes, first with those of earlier runs.

    Raises:
      BusyError: another process measures them.
      InputError: a recording cannot be read.
      OutputError: the figures cannot be written.
    """
    path = figures_file(directory, judge.kind)
    with reporting(f"{path} could not be written"), locked(directory.path / judge.kind):
        known = _figures_by(judge, directory)
        write_lines(path, known.values())
        elsewhere = {k: line for each in siblings for k, line in _figures_by(judge, each).items()}
        left = [take for take in takes if take.key not in known]
        progress(len(takes) - len(left))
        for take in left:
            add_line(path, elsewhere.get(take.key) or _measure(directory, take, judge))
            progress(1)


def _figures_by(judge: Judge, directory: TakeDirectory) -> dict[tuple[str, int], dict[str, Any]]:
    """The figures of this very judge, as `read_figures` returns them."""
    figures = read_figures(directory, judge.kind)
    return {key: line for key, line in figures.items() if line["judge"] == judge.name}


def _measure(directory: TakeDirectory, take: Take, judge: Judge) -> dict[str, Any]:
    audio = load_recording(directory, take)
    head = {"id": take.id, "judge": judge.name, "crc32": take.crc32}
    return head | judge.measure(take, audio)


def read_figures(directory: TakeDirectory, kind: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The figures of a kind of judge so far, by `Take.key`."""
    lines = read_lines(figures_file(directory, kind))
    return {(line["id"], line["crc32"]): line for line in lines}


def figures_file(directory: TakeDirectory, kind: str) -> Path:
    """The file of the figures of a kind of judge."""
    return directory.path / f"{kind}.jsonl"


def load_recording(directory: TakeDirectory, take: Take) -> np.ndarray:
    """The recording of a take, float32 [n] at `SAMPLE_RATE`; empty if nothing was said."""
    if not take.frames:
        return np.zeros(0, np.float32)
    return load_audio(directory.recording(take.id), SAMPLE_RATE)


def _cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """None if one of them is not finite, as of silence."""
    with np.errstate(invalid="ignore"):
        cosine = float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))
    return cosine if math.isfinite(cosine) else None
