"""Finds the alignment heads of a checkpoint that has none, and keeps them beside it."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from csm_jax.align.calibration import calibrate
from csm_jax.align.recordings import Recording
from csm_jax.errors import InputError
from csm_jax.inference.generator import Generator
from csm_jax.inference.request import Request
from csm_jax.io.audio import load_audio
from csm_jax.loading import find_directory
from csm_jax.loading.alignment import keep_alignment
from csm_jax.serve.settings import Limits
from csm_jax.serve.voices.files import read_voices
from csm_jax.serve.voices.presets import find_presets
from csm_jax.train.codes import Clip
from csm_jax.train.data import RecordedTurn, read_conversations, report

# What a checkpoint without recordings speaks itself.
TEXTS = (
    "four nine one seven",
    "two eight zero five",
    "three six nine two",
    "seven one five four",
    "eight zero two six",
    "five three one nine",
    "nine four eight zero",
    "one seven six three",
)
# More recordings do not make the choice any better.
_MAX_RECORDINGS = 80

Warn = Callable[[str], object]


def with_alignment(
    model: Generator, checkpoint: str, warn: Warn, adapters: str | None = None
) -> Generator:
    """The model with alignment heads: its own, or those that are found now and kept.

    Args:
      checkpoint, adapters: what `load` was given. Heads of a model with adapters are not kept.
      warn: is told what is done.

    Raises:
      InputError: no head follows the speech, as in random weights.
      OutputError: they cannot be written.
    """
    directory = find_directory(checkpoint)
    if model.alignment is not None or directory is None:
        model.check_alignment()
        return model
    warn(f"{checkpoint} has no alignment.json: its alignment heads are looked for, once")
    recordings, source = own_recordings(model, checkpoint, directory)
    found = calibrate(model, recordings, source)
    if adapters is None:
        warn(f"{keep_alignment(directory, found)}: found with {source}")
    return dataclasses.replace(model, alignment=found)


def own_recordings(
    model: Generator, checkpoint: str, directory: Path
) -> tuple[list[Recording], str]:
    """Recordings to calibrate a checkpoint with, and what they are: those of its voices that have
    transcripts, or else its own speech."""
    voices = itertools.chain.from_iterable(
        read_voices(prompts, Limits()) for prompts in find_presets(checkpoint, directory)
    )
    recordings = [
        Recording(voice.text, voice.audio, voice.speaker) for voice in voices if voice.text
    ]
    if len(recordings) >= 2:
        return recordings, f"the {len(recordings)} voices of the checkpoint"
    return _own_speech(model), "its own speech"


def _own_speech(model: Generator) -> list[Recording]:
    requests = [Request(text, seed=seed) for seed, text in enumerate(TEXTS)]
    spoken = model.generate_batch(requests, len(requests), notify=lambda index, notice: None)
    return [Recording(text, audio) for text, audio in zip(TEXTS, spoken, strict=True) if len(audio)]


def read_recordings(path: Path, sample_rate: int, warn: Warn) -> list[Recording]:
    """Recordings and transcripts of data for training, in any of its forms; the first 80.

    A file NAME.json beside a recording, as `--words_out` writes it, has the starts of its words.

    Raises:
      InputError: the data or a recording cannot be read.
    """
    conversations, problems = read_conversations(path, warn)
    report(path, problems, len(conversations), "fail", warn)
    turns = itertools.chain.from_iterable(each.turns for each in conversations)
    return [_read(turn, sample_rate) for turn in itertools.islice(turns, _MAX_RECORDINGS)]


def _read(turn: RecordedTurn, sample_rate: int) -> Recording:
    if not turn.audio.is_file():
        raise InputError(f"{turn.audio} does not exist")
    audio = load_audio(turn.audio, sample_rate)
    if isinstance(clip := turn.source, Clip):
        end = None if clip.end is None else round(clip.end * sample_rate)
        return Recording(turn.text, audio[round(clip.start * sample_rate) : end], turn.speaker)
    return Recording(turn.text, audio, turn.speaker, _read_starts(turn.audio.with_suffix(".json")))


def _read_starts(path: Path) -> Sequence[float] | None:
    if not path.is_file():
        return None
    try:
        return [float(word["start"]) for word in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f'{path} is no list of {{"text", "start", "end", "confidence"}}: {error}'
        ) from error
