"""Files that hold tensors, read one tensor at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from csm_jax.checkpoints.torch_files import TORCH_SUFFIXES, load_tensors, plain_names
from csm_jax.config import read_json
from csm_jax.convert.rules import Shape, TensorSource
from csm_jax.convert.weight_files import INDEX, Candidate, candidates, of_index
from csm_jax.errors import CheckpointError
from csm_jax.io.contents import explain

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
    """One safetensors file, or the parts of one checkpoint.

    Names are those without torch's wrappers (`torch_files.plain_names`).

    Args:
      weight_map: the file of every tensor, of an index; None takes all tensors of the files.
    """

    def __init__(self, files: Iterable[Path], weight_map: Mapping[str, str] | None = None):
        files = list(files)
        self.name = str(files[0] if len(files) == 1 else files[0].parent)
        self._places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, Shape] = {}
        found: dict[str, tuple[Path, Shape]] = {}
        for file in files:
            for key, shape in _headers(file, weight_map):
                if key in found:
                    raise CheckpointError(
                        f"{file} and {found[key][0].name} both have tensor {key}, and no index "
                        "says which is meant: download the checkpoint again"
                    )
                found[key] = file, shape
        if absent := sorted((weight_map or {}).keys() - found.keys()):
            raise CheckpointError(
                f"{self.name} lacks tensor {absent[0]}, which its index names: download it again"
            )
        for plain, key in plain_names(found, self.name).items():
            file, self.shapes[plain] = found[key]
            self._places[plain] = file, key

    def read(self, key: str) -> np.ndarray:
        """One tensor. Raises `CheckpointError` if its file is damaged."""
        # A mapping of this tensor alone: its pages are the file's in the kernel's cache, and count
        # as memory of this process only until the array is dropped. The largest table of MisoTTS
        # has 2 GB, of which this process has no copy.
        file, name = self._places[key]
        with _open(file):
            return _map(file, name)


def _headers(file: Path, weight_map: Mapping[str, str] | None) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor that is read from a file."""
    with _open(file) as tensors:
        for key in tensors.keys():  # noqa: SIM118 (a handle, not a dict)
            if weight_map is not None and weight_map.get(key) != file.name:
                continue
            part = tensors.get_slice(key)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{file}: tensor {key} has type {part.get_dtype()}, "
                    f"which is none of {', '.join(_DTYPES)}"
                )
            yield key, jax.ShapeDtypeStruct(tuple(part.get_shape()), dtype)


def _map(file: Path, name: str) -> np.ndarray:
    """A tensor of a valid file, mapped from it: 8 bytes of a length, a JSON header, the data."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))[name]
    dtype, shape = np.dtype(_DTYPES[header["dtype"]]), tuple(header["shape"])
    start, end = header["data_offsets"]
    if start == end:
        return np.zeros(shape, dtype)  # nothing cannot be mapped
    return np.memmap(file, dtype, "r", 8 + length + start, shape)


class TorchSource:
    """State dicts, such as `ckpt.pt` and the parts of a `pytorch_model.bin`."""

    def __init__(self, files: Iterable[Path]):
        files = list(files)
        self.name = str(files[0] if len(files) == 1 else files[0].parent)
        found: dict[str, Any] = {}
        for file in files:
            tensors = load_tensors(file)
            if twice := sorted(found.keys() & tensors.keys()):
                raise CheckpointError(f"{file} has tensor {twice[0]}, which another part has too")
            found |= tensors
        names = plain_names(found, self.name)
        self._tensors = {plain: found[key] for plain, key in names.items()}
        self.shapes = {
            key: jax.ShapeDtypeStruct(tuple(tensor.shape), np.float32)
            for key, tensor in self._tensors.items()
        }

    def read(self, key: str) -> np.ndarray:
        """One tensor, as float32."""
        # numpy has no bfloat16 that torch knows; float32 holds all of its values.
        return self._tensors[key].float().numpy()


def _open(file: Path):
    try:
        return safe_open(file, "np")
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or was not downloaded whole: {explain(error, file)}"
        ) from error


def open_file(file: Path) -> TensorSource:
    """One file of tensors, of a kind that its name tells."""
    if file.name.endswith(INDEX):
        return open_candidate(file.parent, of_index(file.name, read_json(file)))
    return TorchSource([file]) if file.suffix in TORCH_SUFFIXES else SafetensorsSource([file])


def list_candidates(directory: Path) -> list[Candidate]:
    """The checkpoints of a directory, as `weight_files.candidates`."""
    names = [path.name for path in directory.iterdir() if path.is_file()]
    return candidates(names, lambda name: read_json(directory / name))


def open_candidate(directory: Path, candidate: Candidate) -> TensorSource:
    """Opens a checkpoint of a directory.

    Raises:
      CheckpointError: a file is missing or damaged.
    """
    missing = candidate.missing([path.name for path in directory.iterdir()])
    if missing is not None:
        raise CheckpointError(f"{directory} lacks {missing}: download it again")
    files = [directory / name for name in candidate.files]
    if files[0].suffix in TORCH_SUFFIXES:
        return TorchSource(files)
    return SafetensorsSource(files, candidate.weight_map)
