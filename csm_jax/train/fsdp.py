"""Which device holds what while a model is trained: fully sharded data parallelism.

A mesh has two axes. Rows of a batch are divided by both (`sharding.place_rows`); parameters, their
averages and moments by "fsdp", along their longest dimension that it divides. A step gathers the
parameters in the type it computes in, and what it makes of them is divided again. Devices may be
those of many processes.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from csm_jax.errors import InputError
from csm_jax.model.precision import Device
from csm_jax.model.sharding import put

Tree = TypeVar("Tree")
AXES = "data", "fsdp"


def make_fsdp_mesh(fsdp: int = 1, devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes.

    Args:
      fsdp: parts that parameters are divided into; the rest of the devices have copies.
      devices: others than `jax.devices()`.

    Raises:
      InputError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise InputError(f"fsdp is {fsdp}, but must divide the {len(devices)} devices")
    shape = len(devices) // fsdp, fsdp
    return jax.make_mesh(shape, AXES, (AxisType.Auto, AxisType.Auto), devices=devices)


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh | None) -> None:
    """Raises `InputError` for a batch that cannot be divided by its parts and devices."""
    parts = accumulate * (mesh.size if mesh else 1)
    if batch_size < 1 or batch_size % parts:
        raise InputError(
            f"a batch of {batch_size} rows cannot be divided by {accumulate} parts on "
            f"{parts // accumulate} devices: choose a multiple of {parts}"
        )


def fsdp_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where an array of the train state lies."""
    parts = mesh.shape["fsdp"]
    fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or len(shape) < 2 or not fitting:
        return NamedSharding(mesh, P())
    longest = max(fitting, key=lambda axis: shape[axis])
    return NamedSharding(mesh, P(*(None,) * longest, "fsdp"))


def shard(tree: Tree, mesh: Mesh | None) -> Tree:
    """Puts host arrays, the same in every process, where `fsdp_sharding` says."""
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(lambda leaf: put(leaf, fsdp_sharding(np.shape(leaf), mesh)), tree)


def keep_divided(tree: Tree, mesh: Mesh | None) -> Tree:
    """The same inside a jitted function, which will return it where `shard` puts it."""
    if mesh is None:
        return tree
    where = jax.tree.map(lambda leaf: fsdp_sharding(leaf.shape, mesh), tree)
    return jax.lax.with_sharding_constraint(tree, where)


def keep_replicated(tree: Tree, mesh: Mesh | None) -> Tree:
    """The same inside a jitted function, as a whole on every device.

    Otherwise XLA would be free to divide a product along the weights instead of the rows.
    """
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def gather(tree: Tree) -> Tree:
    """Host arrays, the whole of them in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
