"""Files of the open-vocabulary codec: averaged weights of a run, as safetensors."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from safetensors.numpy import load_file, save_file
from sizes import VOICE_CODEC

from csm_jax.checkpoints.native_format import flatten, unflatten
from csm_jax.mimi.codec import abstract


def read_weights(path: Path) -> dict[str, Any]:
    """Reads the codec's parameters from a file."""
    return unflatten(load_file(path), nnx.to_pure_dict(nnx.state(abstract(VOICE_CODEC))))


def write_weights(path: Path, params: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(flatten(jax.device_get(params)), path)
