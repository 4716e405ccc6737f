"""Exports native checkpoints in the layout of transformers, which can then run them."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from csm_jax.checkpoints import native_format
from csm_jax.config import CSMConfig
from csm_jax.convert import csm, mimi
from csm_jax.convert.configs import csm_to_huggingface
from csm_jax.convert.processor_files import write_processor
from csm_jax.convert.rules import Shape, Table, invert
from csm_jax.io.files import new_directory
from csm_jax.prompt.tokenizer import Tokenizer

# A shard is held in memory while it is written.
SHARD_BYTES = 500_000_000


def export_huggingface(
    config: CSMConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: Tokenizer,
    small_files: Iterable[Path],
    out: Path,
    dtype: jnp.dtype | None = None,
) -> None:
    """Writes a directory that `CsmForConditionalGeneration.from_pretrained` loads.

    Args:
      tensors: (path, array) of every parameter, none of them int8.
      small_files: what the source has beside its weights (`native_format.SMALL_FILES`).
      out: must not exist, or be empty; it appears when it is whole.
      dtype: of the model's weights; None keeps them as stored. The codec stays float32.

    Raises:
      CheckpointError, OutputError: as `native_format.read_params` and `native_format.save` do.
    """
    params = dict(tensors)
    size = sum(array.nbytes for array in params.values())
    with new_directory(out, size) as partial:
        _write_shards(partial, _tensors(config, params, dtype))
        stored = params["csm/text_embedding"].dtype
        values = csm_to_huggingface(config) | {"dtype": str(np.dtype(dtype or stored))}
        native_format.write_beside_weights(partial, values, tokenizer, small_files)
        write_processor(partial, config, tokenizer)


class _Tensor(NamedTuple):
    """A tensor of the layout, made when it is written."""

    name: str
    num_bytes: int
    make: Callable[[], np.ndarray]


def _tensors(
    config: CSMConfig, params: Mapping[str, np.ndarray], dtype: jnp.dtype | None
) -> Iterator[_Tensor]:
    codec = mimi.huggingface_table(config.codec).prefixed("codec_model.", "")
    sections: list[tuple[str, Table, jnp.dtype | None]] = [
        ("csm/", csm.huggingface_table(config.backbone, config.depth_decoder), dtype),
        ("codec/", codec, jnp.dtype(jnp.float32)),
    ]
    for prefix, table, section_dtype in sections:
        own = {p.removeprefix(prefix): a for p, a in params.items() if p.startswith(prefix)}
        shapes = _shapes(table, own)
        for name, make in invert(table, own, own.__getitem__):
            num_bytes = shapes[name].size * np.dtype(section_dtype or shapes[name].dtype).itemsize
            yield _Tensor(name, num_bytes, functools.partial(_made, make, section_dtype))


def _shapes(table: Table, params: Mapping[str, np.ndarray]) -> Mapping[str, Shape]:
    """Shapes of the tensors of a layout by name, without making them."""

    def make_all(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: make() for name, make in invert(table, params, params.__getitem__)}

    shapes = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in params.items()}
    return jax.eval_shape(make_all, shapes)


def _made(make: Callable[[], np.ndarray], dtype: jnp.dtype | None) -> np.ndarray:
    return np.ascontiguousarray(make(), dtype)


def _write_shards(directory: Path, tensors: Iterable[_Tensor]) -> None:
    """Shards of at most `SHARD_BYTES` (or one tensor), and the index that transformers reads."""
    shards = _group(tensors)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        save_file({each.name: each.make() for each in shard}, directory / file, {"format": "pt"})
        weight_map |= {each.name: file for each in shard}
    total = sum(each.num_bytes for shard in shards for each in shard)
    values = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(values, indent=2) + "\n")


def _group(tensors: Iterable[_Tensor]) -> list[list[_Tensor]]:
    """The tensors of every shard, in order."""
    shards: list[list[_Tensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards
