"""Finds when the words of a recording are spoken, given its transcript.

    python -m csm_jax.align --checkpoint=demo --audio=speech.wav --text="one two" --out=words.srt

The model hears the recording and predicts it frame by frame; some of its attention heads follow
the text meanwhile. The checkpoint needs an alignment.json, as the bundled demo has it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from csm_jax.align.formats import FORMATS, format_for, write_words
from csm_jax.align.recordings import Recording, align
from csm_jax.cli import flags as cli
from csm_jax.cli import model_flags
from csm_jax.errors import InputError
from csm_jax.io.audio import load_audio
from csm_jax.prompt.turns import check_text

PROGRAM = "csm_jax.align"


def define_flags(values: flags.FlagValues) -> None:
    define = cli.definer(values)
    define(flags.DEFINE_string, "audio", None, "the recording")
    define(flags.DEFINE_string, "text", None, "its transcript")
    define(flags.DEFINE_integer, "speaker", 0, "number of its voice")
    endings = " ".join(FORMATS)
    define(flags.DEFINE_string, "out", None, f"file of the words: {endings}")
    model_flags.define_flags(values)


def main(values: flags.FlagValues) -> None:
    for name in ("audio", "text", "out"):
        if values[name].value is None:
            raise InputError(f"--{name} is missing")
    check_text(values.text)
    out, audio = Path(values.out), Path(values.audio)
    format_for(out)
    if not audio.is_file():
        raise InputError(f"{audio} does not exist")
    model = model_flags.load_model(values)
    samples = load_audio(audio, model.sample_rate)
    words = align(model, Recording(values.text, samples, values.speaker))
    write_words(out, words, len(samples) / model.sample_rate)
    missing = [word.text for word in words if not word.spoken]
    if missing:
        cli.warn(f"not found in the recording: {' '.join(missing)}")
    cli.show(f"{out}: {len(words) - len(missing)} words")


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
