"""Converts published layouts to native checkpoints, for the command line and the hub."""

from pathlib import Path

import jax.numpy as jnp

from csm_jax.checkpoints import native_format
from csm_jax.config import CSMConfig
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.prompt.tokenizer import load_tokenizer


def write_native(
    source: Path,
    out: Path,
    codec: Path | None = None,
    config: CSMConfig | None = None,
    tokenizer: Path | None = None,
    dtype: jnp.dtype | None = None,
    int8: bool = False,
) -> None:
    """Converts a directory or file in a published layout.

    Args:
      source, codec, config: as in `open_checkpoint`.
      out: as in `native_format.save`.
      tokenizer: a tokenizer file or a directory with one; None is the source's own.
      dtype, int8: as in `native_format.save`.

    Raises:
      CheckpointError, OutputError: as those two do.
    """
    opened = open_checkpoint(source, codec, config)
    directory = source if source.is_dir() else source.parent
    loaded = load_tokenizer(tokenizer or directory, opened.config)
    tensors = opened.tensors(native_format.flatten(native_format.param_shapes(opened.config)))
    small = native_format.small_files(directory)
    native_format.save(out, opened.config, tensors, loaded, small, dtype, int8)
