"""The form in which a checkpoint is shipped: transformers' layout, bfloat16, one file."""

import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
from safetensors.numpy import load_file, save_file

from csm_jax.convert.export import export_huggingface
from csm_jax.loading import open_source


def write_shipped(model: Path, out: Path) -> None:
    """Writes the weights, config and tokenizer of a native checkpoint into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        exported = Path(directory) / "exported"
        source = open_source(str(model))
        export_huggingface(
            source.config, source.tensors, source.tokenizer, (), exported, jnp.bfloat16
        )
        tensors = {}
        for shard in sorted(exported.glob("*.safetensors")):
            # The export keeps the codec in float32; untrained.py has rounded it already.
            tensors |= {name: t.astype(jnp.bfloat16) for name, t in load_file(shard).items()}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        for name in ("config.json", "tokenizer.model"):
            shutil.copyfile(exported / name, out / name)


def megabytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*.*")) / 1e6
