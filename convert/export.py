"""Native checkpoints back to the layout of transformers, so that what is tuned here runs there."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from csm_jax import checkpoint
from csm_jax.config import CSMConfig
from csm_jax.convert import csm, mimi
from csm_jax.convert.configs import csm_to_huggingface
from csm_jax.convert.rules import Table, invert
from csm_jax.errors import CheckpointError
from csm_jax.files import new_directory
from csm_jax.tokenizer import load_tokenizer

# A shard is held in memory while it is written.
SHARD_BYTES = 500_000_000


def export_huggingface(source: Path, out: Path, dtype: jnp.dtype | None = None) -> None:
    """Writes a directory that `CsmForConditionalGeneration.from_pretrained` loads.

    Args:
      source: a native checkpoint.
      out: must not exist, or be empty; it appears when it is whole.
      dtype: of the model's weights; None keeps them as stored. The codec stays float32.

    Raises:
      CheckpointError, OutputError: as `checkpoint.load_config` and `checkpoint.save` do.
    """
    config = checkpoint.load_config(source)
    if checkpoint.is_int8(source):
        raise CheckpointError(
            f"{source} is stored as int8, which this layout does not have: export the checkpoint "
            "that it was made from"
        )
    tokenizer = load_tokenizer(source, config)
    params = dict(checkpoint.read_params(source, config))
    size = sum(array.nbytes for array in params.values())
    with new_directory(out, size) as partial:
        _write_shards(partial, _tensors(config, params, dtype))
        stored = params["csm/text_embedding"].dtype
        values = csm_to_huggingface(config) | {"dtype": str(np.dtype(dtype or stored))}
        small = checkpoint.small_files(source)
        checkpoint.write_beside_weights(partial, values, tokenizer, small)


def _tensors(
    config: CSMConfig, params: Mapping[str, np.ndarray], dtype: jnp.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
    codec = mimi.huggingface_table(config.codec).prefixed("codec_model.", "")
    sections: list[tuple[str, Table, jnp.dtype | None]] = [
        ("csm/", csm.huggingface_table(config.backbone, config.depth_decoder), dtype),
        ("codec/", codec, jnp.dtype(jnp.float32)),
    ]
    for prefix, table, section_dtype in sections:
        own = {p.removeprefix(prefix): a for p, a in params.items() if p.startswith(prefix)}
        for name, make in invert(table, own, own.__getitem__):
            yield name, np.ascontiguousarray(make(), section_dtype)


def _write_shards(directory: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Shards of at most `SHARD_BYTES` (or one tensor), and the index that transformers reads."""
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors):
        save_file(shard, directory / _shard_name(len(shards), None), {"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    for index in range(len(shards)):
        old, new = _shard_name(index, None), _shard_name(index, len(shards))
        (directory / old).rename(directory / new)
    weight_map = {
        name: _shard_name(index, len(shards))
        for index, names in enumerate(shards)
        for name in names
    }
    values = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(values, indent=2) + "\n")


def _shard_name(index: int, count: int | None) -> str:
    return f"model-{index + 1:05}-of-{count or 0:05}.safetensors"


def _shards(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard
