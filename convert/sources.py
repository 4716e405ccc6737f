"""Files that hold tensors, read one tensor at a time."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from csm_jax.convert.rules import Shape
from csm_jax.errors import CheckpointError, first_line

_SHARD = re.compile(r"-(\d+)-of-(\d+)$")
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class SafetensorsSource:
    """One safetensors file, or the shards of one checkpoint."""

    def __init__(self, files: Iterable[Path]):
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        files = list(files)
        self.name = str(files[0] if len(files) == 1 else files[0].parent)
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        with _open(file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (a handle, not a dict)
                part = tensors.get_slice(key)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{file}: tensor {key} has type {part.get_dtype()}, "
                        f"which is none of {', '.join(_DTYPES)}"
                    )
                self._files[key] = file
                self.shapes[key] = jax.ShapeDtypeStruct(tuple(part.get_shape()), dtype)

    def read(self, key: str) -> np.ndarray:
        """One tensor. Raises `CheckpointError` if its file is damaged."""
        # The file is opened for every tensor again: pages of a mapping that stays open count as
        # memory of this process, and would add the size of the checkpoint to it.
        with _open(self._files[key]) as tensors:
            return tensors.get_tensor(key)


class TorchSource:
    """A `ckpt.pt` state dict, read by torch, which has to be installed for it."""

    def __init__(self, file: Path):
        self.name = str(file)
        self._tensors = _load_torch(file)
        self.shapes = {
            key: jax.ShapeDtypeStruct(tuple(tensor.shape), np.float32)
            for key, tensor in self._tensors.items()
        }

    def read(self, key: str) -> np.ndarray:
        """One tensor, as float32."""
        # numpy has no bfloat16 that torch knows; float32 holds all of its values.
        return self._tensors[key].float().numpy()


def _load_torch(file: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"reading {file} needs torch: pip install torch, or use the model.safetensors of the "
            "same checkpoint"
        ) from None
    try:
        # weights_only: a pickle can run any code, a checkpoint should not.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read by torch: {first_line(error)}") from error
    tensors = tensors.get("model", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(hasattr(t, "shape") for t in tensors.values()):
        raise CheckpointError(f"{file} is not a dictionary of tensors")
    return tensors


def _open(file: Path):
    try:
        return safe_open(file, "np")
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or was not downloaded whole: {first_line(error)}"
        ) from error


def shard_groups(directory: Path) -> list[list[Path]]:
    """The safetensors files of a directory, grouped into checkpoints.

    The hub repository of CSM-1B holds two checkpoints side by side; a glob would mix them.

    Raises:
      CheckpointError: a shard is missing.
    """
    groups: dict[str, list[Path]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        groups.setdefault(_SHARD.sub("", file.stem), []).append(file)
    for files in groups.values():
        _check_complete(files)
    return list(groups.values())


def _check_complete(files: list[Path]) -> None:
    match = _SHARD.search(files[0].stem)
    if match is None:
        return
    total = int(match[2])
    present = {int(m[1]) for file in files if (m := _SHARD.search(file.stem))}
    absent = sorted(set(range(1, total + 1)) - present)
    if absent:
        raise CheckpointError(
            f"{files[0].parent} lacks part {absent[0]} of {total} of "
            f"{_SHARD.sub('', files[0].stem)}.safetensors: download it again"
        )
