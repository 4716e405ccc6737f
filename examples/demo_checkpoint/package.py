"""Writes the trained model in its shipped form: transformers' layout, bfloat16, one file.

python examples/demo_checkpoint/package.py --model=demo/run/model --out=csm_jax/loading/demo
"""

import tempfile
from pathlib import Path

from absl import app, flags, logging
from flite import VOICES, synthesize
from shipped_form import megabytes, write_shipped

from csm_jax.io.audio import load_audio, save_audio

MODEL = flags.DEFINE_string("model", "demo/run/model", "the native checkpoint of the run")
# Texts of the voice prompts.
PROMPTS = {"slt": "one five two nine", "rms": "six zero seven three"}

OUT = flags.DEFINE_string("out", "csm_jax/loading/demo", "directory to write into")


def write_prompts(directory: Path) -> None:
    """Writes a recording of each voice, and its transcript beside it."""
    directory.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for speaker, voice in enumerate(VOICES):
            recording = synthesize(PROMPTS[voice], voice, Path(temporary) / f"{voice}.wav")
            save_audio(directory / f"{voice}.flac", load_audio(recording, 24_000), 24_000)
            transcript = f"speaker: {speaker}\n{PROMPTS[voice]}\n"
            (directory / f"{voice}.txt").write_text(transcript)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    out = Path(OUT.value)
    write_shipped(Path(MODEL.value), out)
    write_prompts(out / "prompts")
    print(f"{out}: {megabytes(out):.1f} MB")


if __name__ == "__main__":
    app.run(main)
