"""Finds when the words of a recording are spoken, given its transcript.

    python -m csm_jax.align --checkpoint=demo --audio=speech.wav --text="one two" --out=words.srt
    python -m csm_jax.align --calibrate --checkpoint=DIRECTORY
    python -m csm_jax.align --calibrate --checkpoint=DIRECTORY --data=recordings.jsonl

The model hears the recording and predicts it frame by frame; some of its attention heads follow
the text meanwhile. Which ones is in the checkpoint's alignment.json. --calibrate finds them, with
the voices of the checkpoint, its own speech, or recordings with transcripts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from csm_jax.align.calibration import calibrate
from csm_jax.align.finding import own_recordings, read_recordings, with_alignment
from csm_jax.align.recordings import Recording, align
from csm_jax.checkpoints import alignment_heads as heads
from csm_jax.cli import flags as cli
from csm_jax.cli import model_flags
from csm_jax.errors import InputError
from csm_jax.inference.alignment.formats import FORMATS, check_words_out, write_words
from csm_jax.inference.generator import Generator
from csm_jax.io.audio import load_audio
from csm_jax.io.files import reporting
from csm_jax.io.outputs import check_writable
from csm_jax.loading import find_directory
from csm_jax.prompt.turns import check_text

PROGRAM = "csm_jax.align"
_OF_A_RECORDING = ("audio", "text", "speaker", "out")


def define_flags(values: flags.FlagValues) -> None:
    define = cli.definer(values)
    define(flags.DEFINE_string, "audio", None, "the recording")
    define(flags.DEFINE_string, "text", None, "its transcript")
    define(flags.DEFINE_integer, "speaker", 0, "number of its voice")
    endings = " ".join(FORMATS)
    define(flags.DEFINE_string, "out", None, f"file of the words: {endings}")
    find = "find the alignment heads of the checkpoint, and write its alignment.json"
    define(flags.DEFINE_boolean, "calibrate", False, find)
    data = (
        "recordings with transcripts to calibrate with, in any form that csm_jax.finetune reads; "
        "NAME.json beside a recording, as --words_out writes it, has the times of its words"
    )
    define(flags.DEFINE_string, "data", None, data)
    model_flags.define_flags(values)


def main(values: flags.FlagValues) -> None:
    if values.calibrate:
        _calibrate(values)
    else:
        _align(values)


def _align(values: flags.FlagValues) -> None:
    """Writes the words of a recording."""
    for name in ("audio", "text", "out"):
        if values[name].value is None:
            raise InputError(f"--{name} is missing")
    if values.data is not None:
        raise InputError("--data is for --calibrate, which is missing")
    check_text(values.text)
    out, audio = Path(values.out), Path(values.audio)
    check_words_out(out)
    if not audio.is_file():
        raise InputError(f"{audio} does not exist")
    model = model_flags.load_model(values)
    model = with_alignment(model, values.checkpoint, cli.warn, values.adapters)
    samples = load_audio(audio, model.sample_rate)
    words = align(model, Recording(values.text, samples, values.speaker))
    write_words(out, words, len(samples) / model.sample_rate)
    missing = [word.text for word in words if not word.spoken]
    if missing:
        cli.warn(f"not found in the recording: {' '.join(missing)}")
    cli.show(f"{out}: {len(words) - len(missing)} words")


def _calibrate(values: flags.FlagValues) -> None:
    """Writes the alignment heads of a checkpoint."""
    for name in _OF_A_RECORDING:
        if values[name].present:
            raise InputError(f"--{name} and --calibrate do not go together")
    directory = find_directory(values.checkpoint)
    if directory is None:
        raise InputError(f"{values.checkpoint} has random weights: no head of it follows speech")
    path = directory / heads.FILE_NAME
    if path.exists():
        raise InputError(f"{path} exists: remove it to calibrate again")
    with reporting(f"{path} cannot be written"):
        check_writable(path)
    model = model_flags.load_model(values)
    recordings, source = _recordings(values, model, directory)
    found = calibrate(model, recordings, source)
    with reporting(f"{path} could not be written"):
        heads.write(directory, found)
    for layer, head in found.heads:
        cli.show(f"{path}: head {head} of layer {layer}, found with {source}")
    if not any(recording.starts for recording in recordings):
        cli.warn(
            "the recordings tell no times of words, so the lag is a guess: words may be early or "
            "late by a tenth of a second"
        )


def _recordings(
    values: flags.FlagValues, model: Generator, directory: Path
) -> tuple[list[Recording], str]:
    if values.data is None:
        return own_recordings(model, values.checkpoint, directory)
    data = Path(values.data)
    recordings = read_recordings(data, model.sample_rate, cli.warn)
    return recordings, f"{len(recordings)} recordings of {data.name}"


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
