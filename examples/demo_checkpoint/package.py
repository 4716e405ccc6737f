"""Writes the trained model in its shipped form: transformers' layout, bfloat16, one file.

python examples/demo_checkpoint/package.py --model=demo/run/model --out=csm_jax/loading/demo
"""

import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
from absl import app, flags, logging
from flite import VOICES, synthesize
from safetensors.numpy import load_file, save_file

from csm_jax.convert.export import export_huggingface
from csm_jax.io.audio import load_audio, save_audio
from csm_jax.loading import open_source

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
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        exported = Path(directory) / "exported"
        model = open_source(MODEL.value)
        export_huggingface(model.config, model.tensors, model.tokenizer, (), exported, jnp.bfloat16)
        tensors = {}
        for shard in sorted(exported.glob("*.safetensors")):
            # The export keeps the codec in float32; assemble.py has rounded it already.
            tensors |= {name: t.astype(jnp.bfloat16) for name, t in load_file(shard).items()}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        for name in ("config.json", "tokenizer.model"):
            shutil.copyfile(exported / name, out / name)
    write_prompts(out / "prompts")
    print(f"{out}: {sum(file.stat().st_size for file in out.rglob('*.*')) / 1e6:.1f} MB")


if __name__ == "__main__":
    app.run(main)
