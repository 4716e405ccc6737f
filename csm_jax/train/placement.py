"""Which device holds what while a model is trained: fully sharded data parallelism.

A mesh has two axes. Rows of a batch are divided by both; parameters, their averages and moments by
"fsdp", along their longest dimension that it divides. A step gathers the parameters in the type it
computes in, and what it makes of them lies in parts again. Devices may be those of many processes.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from csm_jax.errors import InputError

Tree = TypeVar("Tree")
AXES = "data", "fsdp"


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes.

    Args:
      fsdp: in how many parts parameters lie; the rest of the devices have copies.
      devices: others than `jax.devices()`.

    Raises:
      InputError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise InputError(f"fsdp is {fsdp}, but must divide the {len(devices)} devices")
    shape = len(devices) // fsdp, fsdp
    return jax.make_mesh(shape, AXES, (AxisType.Auto, AxisType.Auto), devices=devices)


def check_rows(rows: int, accumulate: int, mesh: Mesh | None) -> None:
    """Raises `InputError` for a batch that cannot be divided by its parts and devices."""
    parts = accumulate * (mesh.size if mesh else 1)
    if rows < 1 or rows % parts:
        raise InputError(
            f"a batch of {rows} rows cannot be divided by {accumulate} parts on "
            f"{parts // accumulate} devices: choose a multiple of {parts}"
        )


def sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where something that is kept lies."""
    parts = mesh.shape["fsdp"]
    fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or len(shape) < 2 or not fitting:
        return NamedSharding(mesh, P())
    longest = max(fitting, key=lambda axis: shape[axis])
    return NamedSharding(mesh, P(*(None,) * longest, "fsdp"))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Where rows of a batch lie."""
    return NamedSharding(mesh, P(AXES))


def place(tree: Tree, mesh: Mesh | None) -> Tree:
    """Puts host arrays, the same in every process, where they are kept."""
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(lambda leaf: _put(leaf, sharding(np.shape(leaf), mesh)), tree)


def place_rows(rows: Tree, mesh: Mesh | None) -> Tree:
    """Puts host arrays [B, ...], the same in every process, on the devices of their rows."""
    if mesh is None:
        return jax.device_put(rows)
    return jax.tree.map(lambda leaf: _put(leaf, rows_sharding(mesh)), rows)


def _put(leaf: Any, where: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, where)  # it lies on the mesh already
    # Every process has the whole, and gives its devices their part.
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)


def keep_placed(tree: Tree, mesh: Mesh | None) -> Tree:
    """The same inside a jitted function, which will return it where it is kept."""
    if mesh is None:
        return tree
    where = jax.tree.map(lambda leaf: sharding(leaf.shape, mesh), tree)
    return jax.lax.with_sharding_constraint(tree, where)


def keep_whole(tree: Tree, mesh: Mesh | None) -> Tree:
    """The same inside a jitted function, on every device as a whole.

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
