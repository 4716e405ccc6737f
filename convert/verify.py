"""Checks a checkpoint for damage: with its checksums, or without them by its tensors."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from csm_jax.checkpoints import checksums, native_format
from csm_jax.convert.layouts import open_all
from csm_jax.errors import BusyError, CheckpointError
from csm_jax.io.files import is_locked


def verify(directory: Path) -> str:
    """Reads a whole checkpoint, in any layout; returns a line with the result.

    A native checkpoint is compared with its checksums. Other layouts, and native ones of older
    versions, have none: their files must have all tensors of their headers, with finite values.

    Raises:
      BusyError: another process is writing it.
      CheckpointError: it is damaged, or there is none.
    """
    directory = Path(os.path.realpath(directory))
    if is_locked(directory):
        raise BusyError(f"{directory} is being written by another process: verify it afterwards")
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist")
    is_native = native_format.is_native(directory) or (directory / checksums.FILE).exists()
    if is_native and (count := native_format.check_files(directory, thorough=True)):
        return f"{directory}: {count} files are as they were written"
    num_tensors = num_bytes = 0
    for path, array in _tensors(directory):
        native_format.check_finite(f"{directory}: {path}", array)
        num_tensors += 1
        num_bytes += array.nbytes
    return (
        f"{directory}: {num_tensors} tensors of {num_bytes / 1e9:.3f} GB are whole and finite; "
        "there are no checksums to compare them with"
    )


def _tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    if native_format.is_native(directory):
        yield from native_format.read_params(directory, native_format.load_config(directory))
        return
    is_empty = True
    for source in open_all(directory):
        for key in source.shapes:
            yield key, source.read(key)
            is_empty = False
    if is_empty:
        raise CheckpointError(f"{directory} holds no checkpoint: no tensors are in it")
