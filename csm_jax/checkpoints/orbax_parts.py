"""The parts of a native checkpoint, as Orbax writes and reads them.

This module is imported where it is called: Orbax takes half a second to import, and a checkpoint
that lies on the disk as plain arrays is read without it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from csm_jax.model.layers import Params


@contextlib.contextmanager
def checkpointer() -> Iterator[ocp.Checkpointer]:
    """An Orbax checkpointer of this process alone, which says nothing about its options."""
    this = jax.process_index()
    # Only one of several processes writes what they have trained, without the others.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    # A file per tensor instead of one OCDBT database, and no compression, which saves nothing with
    # weights: this is several times as fast, and needs no other copy in memory.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, multiprocessing_options=alone
    )
    verbosity = logging.get_verbosity()
    # Orbax warns about the database that is not there, for every part.
    logging.set_verbosity(min(verbosity, logging.ERROR))
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as made:
            yield made
    finally:
        logging.set_verbosity(verbosity)


def save(to: ocp.Checkpointer, directory: Path, arrays: Params) -> None:
    """Writes a part to a directory that does not exist yet."""
    to.save(directory, args=ocp.args.PyTreeSave(arrays))


def restore(directory: Path, shapes: Params) -> Params:
    """Reads a part into host memory, in the types it is stored in.

    Raises:
      ValueError: its parameters are not those of `shapes`; and whatever Orbax raises for files
        that are missing or damaged.
    """
    as_stored = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    with checkpointer() as opened:
        return opened.restore(
            directory, args=ocp.args.PyTreeRestore(shapes, restore_args=as_stored)
        )
