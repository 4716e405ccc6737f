"""Native checkpoints: an Orbax directory of parameters, a config and a tokenizer.

    DIR/config.json       sizes, and the format's name and version
    DIR/params/PART/      Orbax: a layer, an embedding, the codec, ... each a checkpoint of its own
    DIR/tokenizer.json    or tokenizer.model; and small files of the source, kept for the way back
    DIR/checksums.json    of all these files

A directory appears under its name only when it is whole (`files.new_directory`).
"""

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from csm_jax.checkpoints import alignment_heads, checksums
from csm_jax.checkpoints.quantize import prepare
from csm_jax.config import CSMConfig, read_json
from csm_jax.errors import CheckpointError, first_line
from csm_jax.io.files import new_directory
from csm_jax.mimi import codec
from csm_jax.model import csm as model
from csm_jax.model.layers import Params
from csm_jax.model.precision import FLOAT32, Precision
from csm_jax.prompt import limits
from csm_jax.prompt.tokenizer import Tokenizer

FORMAT = "csm-jax"
VERSION = 2
# Values that are checked together, which fit into the processor's cache.
_BLOCK = 1 << 18
# Puts the parameter of a path where it belongs.
Place = Callable[[str, np.ndarray | jax.Array], np.ndarray | jax.Array]

# What a checkpoint directory may hold beside weights; copied as it is, so that a conversion
# back to the Hugging Face layout finds it again.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
SMALL_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    alignment_heads.FILE_NAME,
    limits.FILE_NAME,
)


def param_shapes(config: CSMConfig, precision: Precision = FLOAT32) -> Params:
    """Shapes of all parameters in their two sections; the codec is float32 always."""
    return {
        "csm": nnx.to_pure_dict(nnx.state(model.abstract(config, precision))),
        "codec": nnx.to_pure_dict(nnx.state(codec.abstract(config.codec))),
    }


def flatten(params: Params) -> dict[str, Any]:
    """Parameters by their paths, such as "csm/backbone/layers/0/attn/qkv/weight"."""
    flat = traverse_util.flatten_dict(params)
    return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


def unflatten(flat: Mapping[str, Any], like: Params) -> Params:
    """The reverse of `flatten`, with the key types of `like`."""
    paths = {"/".join(map(str, path)): path for path in traverse_util.flatten_dict(like)}
    return traverse_util.unflatten_dict({paths[name]: leaf for name, leaf in flat.items()})


def small_files(directory: Path) -> list[Path]:
    """The files of `SMALL_FILES` that a directory has."""
    return [directory / name for name in SMALL_FILES if (directory / name).is_file()]


def is_native(directory: Path) -> bool:
    """Whether a directory is laid out as a native checkpoint."""
    return (directory / "params").is_dir() and (directory / "config.json").is_file()


def save(
    directory: Path,
    config: CSMConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: Tokenizer,
    small_files: Iterable[Path] = (),
    dtype: jnp.dtype | None = None,
    int8: bool = False,
    replace: bool = False,
) -> None:
    """Writes a native checkpoint, whole or not at all.

    Args:
      directory, replace: as in `files.new_directory`.
      tensors: (path, array) of every parameter, those of one layer after another, as from
        `Checkpoint.tensors`.
      dtype: type to store the model's parameters in; None keeps them as they come.
      int8: store the matrices as int8 (`quantize.py`).

    Raises:
      CheckpointError: a parameter has values that are not finite.
      OutputError: it exists, cannot be written, or the disk is full.
    """
    from csm_jax.checkpoints import orbax_parts  # slow to import

    shapes = param_shapes(config, dataclasses.replace(FLOAT32, int8=int8))
    description = {
        "format": FORMAT,
        "version": VERSION,
        "int8": int8,
        "checksums": True,
        "config": config.to_dict(),
    }
    size = _size(flatten(shapes), dtype)
    with new_directory(directory, size, replace) as partial, checksums.Writer(partial) as sums:
        with orbax_parts.checkpointer() as checkpointer:
            for part, group in itertools.groupby(tensors, _part_of):
                stored = [_as_stored(path, tensor, dtype, int8) for path, tensor in group]
                flat = dict(itertools.chain.from_iterable(stored))
                path = partial.absolute() / "params" / part
                orbax_parts.save(checkpointer, path, unflatten(flat, shapes))
                sums.add(partial / "params" / part)
        write_beside_weights(partial, description, tokenizer, small_files)
        for file in partial.iterdir():
            if file.is_file():
                sums.add(file)
        sums.write()


def write_beside_weights(
    directory: Path, config: dict[str, Any], tokenizer: Tokenizer, small_files: Iterable[Path]
) -> None:
    """Writes what a checkpoint of any layout has beside its weights, `config.json` last."""
    for file in small_files:
        shutil.copyfile(file, directory / file.name)
    tokenizer.save(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _part(path: str) -> str:
    """The Orbax checkpoint that a parameter is in.

    Orbax copies all of a checkpoint in memory while it writes it; part by part, a conversion needs
    less memory than the model has.
    """
    names = path.split("/")
    if names[0] == "codec":
        return "codec"
    return ".".join(names[:4] if "layers" in names else names[:2])


def _as_stored(
    path: str, tensor: np.ndarray, dtype: jnp.dtype | None, int8: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) of all that is stored for one tensor."""
    kept = jnp.dtype(dtype or tensor.dtype)
    for name, array in prepare(path, tensor, Precision(kept, kept, int8)).items():
        stored = np.ascontiguousarray(array)
        check_finite(name, stored)
        yield name, stored


def check_finite(path: str, array: np.ndarray) -> None:
    """Raises `CheckpointError` for an array that has NaN or infinite values."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return
    # By their bits: numpy has no fast test of bfloat16, and floats would warn.
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits.dtype)
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK]
        if ((block & infinity) == infinity).any():
            raise CheckpointError(
                f"{path} has values that are NaN or infinite in {array.dtype}: its source is "
                "damaged, or too large for this type"
            )


def _size(shapes: Mapping[str, Any], dtype: jnp.dtype | None) -> int:
    """The least number of bytes that the parameters will take."""
    width = np.dtype(dtype or np.float16).itemsize

    def width_of(path: str, stored: jnp.dtype) -> int:
        if path.startswith("codec/"):
            return 4
        return min(width, stored.itemsize)

    return sum(int(np.prod(s.shape)) * width_of(path, s.dtype) for path, s in shapes.items())


def load_config(directory: Path) -> CSMConfig:
    """The config of a native checkpoint. Raises `CheckpointError` if it cannot be read."""
    return CSMConfig.from_dict(_description(directory).get("config") or {})


def is_int8(directory: Path) -> bool:
    """Whether the matrices of a native checkpoint are stored as int8.

    Raises `CheckpointError` if its config cannot be read.
    """
    return _description(directory).get("int8") is True


def check_files(directory: Path, thorough: bool = False) -> int:
    """Compares the files of a native checkpoint with its checksums; returns how many it has.

    Checkpoints of older versions have none.

    Args:
      thorough: compare all files and look for additional ones; otherwise only those beside the
        weights are compared, because reading the weights takes longer than mapping them.

    Raises:
      CheckpointError: a file is missing, changed or additional.
    """
    if not _description(directory).get("checksums"):
        return 0
    sums = checksums.read(directory)
    if thorough:
        found = checksums.differences(directory, sums) + checksums.additions(directory, sums)
    else:
        beside = {name: each for name, each in sums.items() if "/" not in name}
        found = checksums.differences(directory, beside)
    if found:
        more = f", and {len(found) - 1} more files are not as they were" if found[1:] else ""
        raise CheckpointError(
            f"{directory} is damaged ({found[0]}{more}): convert the checkpoint again"
        )
    return len(sums)


def _description(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a {FORMAT} checkpoint")
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{directory} has format version {values.get('version')}, this program reads "
            f"{VERSION}: update csm-jax or convert the checkpoint again"
        )
    return values


def on_default_device(path: str, tensor: np.ndarray | jax.Array) -> jax.Array:
    """Puts an array on the default device; on a CPU nothing is copied."""
    return jax.device_put(tensor)


def place_params(
    tensors: Iterable[tuple[str, np.ndarray]],
    config: CSMConfig,
    precision: Precision,
    place: Place = on_default_device,
) -> Params:
    """Parameters of a model from (path, array) pairs, in the types of `precision`."""
    flat: dict[str, np.ndarray | jax.Array] = {}
    for path, tensor in tensors:
        for name, array in prepare(path, place(path, tensor), precision).items():
            flat[name] = place(name, array)  # a scale is new, and not placed yet
    return unflatten(flat, param_shapes(config, precision))


def read_params(directory: Path, config: CSMConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, array) in host memory, in the types they are stored in, part by part.

    Raises:
      CheckpointError: a file is missing or damaged.
    """
    shapes = param_shapes(config, dataclasses.replace(FLOAT32, int8=is_int8(directory)))
    check_files(directory)
    try:
        for part, group in itertools.groupby(sorted(flatten(shapes).items()), _part_of):
            path = directory.absolute() / "params" / part
            item = unflatten(dict(group), shapes)
            arrays = _map(path, flatten(item)) or _restore(path, item)
            _check_shapes(arrays, flatten(item))
            yield from arrays.items()
    except Exception as error:
        raise CheckpointError(
            f"{directory} is damaged ({first_line(error)}): convert the checkpoint again"
        ) from error


def _check_shapes(arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> None:
    for path, array in arrays.items():
        if array.shape != wanted[path].shape:
            raise ValueError(f"{path} is {array.shape}, the config wants {wanted[path].shape}")


def _restore(part: Path, item: Params) -> dict[str, np.ndarray]:
    from csm_jax.checkpoints import orbax_parts  # slow to import

    return flatten(orbax_parts.restore(part, item))


def _map(part: Path, wanted: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """The arrays of a part, mapped from their files; None if Orbax did not write them plainly.

    A plain array is one of zarr with a single chunk and no compression, which is the array's bytes.
    Mapping takes milliseconds, and a CPU computes on the mapping without a copy; tensorstore takes
    9 s to read int8 weights of the full size.
    """
    mapped = {}
    for path in wanted:
        array = part / path.replace("/", ".")
        if not (array / ".zarray").is_file():
            return None
        layout = json.loads((array / ".zarray").read_text())
        shape, is_plain = tuple(layout["shape"]), not (layout["compressor"] or layout["filters"])
        if not (is_plain and layout["chunks"] == layout["shape"] and layout["order"] == "C"):
            return None
        chunk = array / ".".join("0" * len(shape))
        dtype = jnp.dtype(layout["dtype"].strip("<|"))
        if chunk.stat().st_size != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{chunk.name} of {array.name} has {chunk.stat().st_size} bytes")
        mapped[path] = np.memmap(chunk, dtype, "r", shape=shape)
    return mapped


def _part_of(item: tuple[str, Any]) -> str:
    return _part(item[0])
