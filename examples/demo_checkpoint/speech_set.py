"""A set of recordings on disk, with a `manifest.jsonl`."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from phonemes import SILENCE, SOUNDS, sounds_of
from tqdm import tqdm

from csm_jax.io.audio import load_audio

SAMPLE_RATE = 24_000
# Samples in one unit of a duration.
UNIT = 600
UNKNOWN = -1


@dataclass(frozen=True)
class Utterance:
    """A recording and its alignment by the synthesizer.

    Attributes:
      phonemes: the synthesizer's symbols.
      durations: of the leading silence, every symbol and the end, in units of `UNIT` samples.
      start: samples that were trimmed from the beginning of the aligned audio; None if unknown.
      dialogue: a number that the turns of a dialogue share; None without a dialogue.
      spoken: the text in words, as the synthesizer got it.
    """

    audio: Path
    text: str
    voice: str
    phonemes: str
    durations: tuple[int, ...]
    start: int | None
    dialogue: int | None = None
    spoken: str = ""

    @property
    def seconds(self) -> float:
        """Upper limit of the length in seconds, which includes the silence trimmed from the end."""
        return (sum(self.durations) * UNIT - (self.start or 0)) / SAMPLE_RATE


def read_manifests(directories: Iterable[Path]) -> list[Utterance]:
    """Reads the utterances of all directories, in the order of the manifests.

    A manifest may have parts, `manifest*.jsonl`, one for each process that wrote it.
    """
    return [
        _utterance(directory, line)
        for directory in directories
        for part in sorted(directory.glob("manifest*.jsonl"))
        for line in read_lines(part)
    ]


def read_lines(path: Path) -> list[dict]:
    """Reads lines of JSON, without an incomplete last line of a killed writer."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _utterance(directory: Path, line: dict) -> Utterance:
    return Utterance(
        directory / line["audio"],
        line["text"],
        line["voice"],
        line["phonemes"],
        tuple(line["durations"]),
        line["start"],
        line.get("dialogue"),
        line.get("spoken", line["text"]),
    )


def unit_labels(utterance: Utterance) -> np.ndarray:
    """The index in `SOUNDS` of each unit of the recording, int8; `UNKNOWN` without a start.

    The first unit is the one with the first sample of the recording.
    """
    if utterance.start is None:
        return np.full(sum(utterance.durations), UNKNOWN, np.int8)
    sounds = [SILENCE, *sounds_of(utterance.phonemes), SILENCE]
    indices = [SOUNDS.index(sound) for sound in sounds]
    labels = np.repeat(np.array(indices, np.int8), utterance.durations)
    return labels[utterance.start // UNIT :]


class Packed:
    """Recordings one after another in one file of 16-bit samples, which is memory-mapped.

    Args:
      utterances: their recordings are packed into `directory`, unless the file exists.
    """

    def __init__(self, directory: Path, utterances: Sequence[Utterance]):
        names = "\n".join(str(each.audio) for each in utterances)
        path = directory / f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.pcm"
        lengths = path.with_suffix(".npy")
        if not lengths.exists():
            directory.mkdir(parents=True, exist_ok=True)
            np.save(lengths, _pack(path, utterances))
        self.utterances = utterances
        self.lengths: np.ndarray = np.load(lengths)
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self._samples = np.memmap(path, "<i2", "r")
        self._labels = [unit_labels(each) for each in utterances]

    def audio(self, index: int, start: int, size: int) -> np.ndarray:
        """Audio float32 [size] from sample `start` of a recording, with zeros after its end."""
        first = self._offsets[index] + start
        piece = self._samples[first : min(first + size, self._offsets[index + 1])]
        return np.pad(piece.astype(np.float32) / 32768, (0, size - len(piece)))

    def labels(self, index: int, times: np.ndarray) -> np.ndarray:
        """Labels int32 [N] at samples `times` [N] of a recording; silence after its end."""
        row = self._labels[index]
        units = (times + (self.utterances[index].start or 0) % UNIT) // UNIT
        after = UNKNOWN if self.utterances[index].start is None else SOUNDS.index(SILENCE)
        return np.where(units < len(row), row[np.minimum(units, len(row) - 1)], after)


def _pack(path: Path, utterances: Sequence[Utterance]) -> np.ndarray:
    """Writes all samples to `path`; returns the length of each recording."""
    lengths = []
    with path.open("wb") as file:
        for each in tqdm(utterances, desc="packing", disable=None):
            audio = load_audio(each.audio, SAMPLE_RATE)
            file.write((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())
            lengths.append(len(audio))
    return np.array(lengths)
