"""Which device holds what: one table from parameter path to PartitionSpec, and the rest by rule.

A mesh for generation has two axes. "data" splits the rows of a batch. "model" splits every
attention by kv heads and every MLP by its hidden dimension (Megatron: Shoeybi et al., 2019), so
that a block costs two sums over the axis, of [B, T, D] each. Modules know nothing of it: parameters
and state lie where this file says, and XLA divides the work accordingly. Without a mesh nothing
here has an effect. Training divides its parameters in another way (`train/fsdp.py`), its rows as
here.

What an axis does not divide is replicated on it. The depth decoder's 2 kv heads, for one, are on
every chip of a model axis of 4, and its MLP, which is most of it, is split. The codec, a twentieth
of the work, is on one device.
"""

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.model.precision import Device

Tree = TypeVar("Tree")

_LAYER = r"csm/(backbone|depth_decoder)/layers/\d+"

# Every path matches one pattern as a whole. Rows of qkv and columns of o are grouped by kv heads
# (`llama.Attention`); the scale of an int8 weight belongs to its rows.
#
# The text table is the largest array, and split by rows it costs one sum a frame. By columns, XLA
# would carry the residual stream in columns too, and gather it in every block. The audio table,
# the projection and the heads are used at each of the 31 depth steps, where one more sum takes as
# long as reading what it saves (and the 2051 rows of a head are 7 x 293, which no mesh divides).
TABLE: tuple[tuple[str, P | None], ...] = (
    (rf"{_LAYER}/attn/qkv/weight(_scale)?", P("model")),
    (rf"{_LAYER}/attn/o/weight", P(None, "model")),
    (rf"{_LAYER}/attn/o/weight_scale", P()),
    (rf"{_LAYER}/mlp/(gate|up)/weight(_scale)?", P("model")),
    (rf"{_LAYER}/mlp/down/weight", P(None, "model")),
    (rf"{_LAYER}/mlp/down/weight_scale", P()),
    (r"csm/(.+/)?(attn_norm|mlp_norm|norm)/scale", P()),
    (r"csm/text_embedding", P("model")),
    (r"csm/audio_embedding", P()),
    (r"csm/(codebook0_head|depth_heads|projection)/weight(_scale)?", P()),
    (r"codec/.+", None),  # not on the mesh
)


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices to generate on.

    Args:
      data: parts that the rows of a batch are divided into; what is generated is the same.
      model: parts that most weights are divided into; every device holds and reads one.
      devices: None is those of this process. Several processes share no mesh: they share out
        requests.

    Raises:
      InputError: there are not as many devices.
    """
    devices = jax.local_devices() if devices is None else devices
    if min(data, model) < 1 or data * model > len(devices):
        raise InputError(
            f"a mesh of {data} x {model} needs {data * model} devices, of which there are "
            f"{len(devices)}: choose a smaller one"
        )
    kinds = AxisType.Auto, AxisType.Auto
    return jax.make_mesh((data, model), ("data", "model"), kinds, devices=devices)


def param_sharding(
    path: str, shape: tuple[int, ...], config: CSMConfig, mesh: Mesh
) -> NamedSharding | None:
    """Where one parameter lies; `path` as of `native_format.flatten`."""
    (wanted,) = (spec for pattern, spec in TABLE if re.fullmatch(pattern, path))
    if wanted is None:
        return None
    return NamedSharding(mesh, _fitting(wanted, _counts(path, shape, config), mesh))


def place_on(mesh: Mesh, config: CSMConfig) -> Callable[[str, Any], jax.Array]:
    """A `native_format.Place`, for arrays in host memory or on other devices."""

    def place(path: str, tensor: np.ndarray | jax.Array) -> jax.Array:
        return jax.device_put(tensor, param_sharding(path, tensor.shape, config, mesh))

    return place


def check_rows(size: int, mesh: Mesh | None) -> None:
    """Raises `InputError` for a batch to generate that the data axis does not divide.

    One row alone is allowed: it is computed on all devices.
    """
    axis = mesh.shape["data"] if mesh else 1
    if size > 1 and size % axis:
        raise InputError(
            f"{size} rows cannot be divided by the mesh's data axis of {axis}: choose a batch of "
            f"{-(-size // axis) * axis}"
        )


def place_rows(rows: Tree, mesh: Mesh | None) -> Tree:
    """Puts host arrays [B, ...], the same in every process, on the devices of their rows."""
    if mesh is None:
        return jax.device_put(rows)
    return jax.tree.map(put, rows, rows_sharding(rows, mesh))


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts a host array, the same in every process, or one that lies on the mesh already."""
    is_here = sharding.is_fully_addressable
    if is_here or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    # Every process has the whole, and gives its devices their part.
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def rows_sharding(rows: Any, mesh: Mesh) -> Any:
    """Where arrays [B, ...] (or their shapes) lie: rows over all axes but "model"."""
    axes = tuple(name for name in mesh.axis_names if name != "model")
    return jax.tree.map(lambda leaf: _sharding(P(axes), leaf, mesh), rows)


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """Where a `GenerationState` (or its shapes) lies: rows over "data", kv heads over "model"."""
    heads = P("data", "model")
    layers = jax.tree.map(lambda leaf: _sharding(heads, leaf, mesh), state.cache.layers)
    sharding = rows_sharding(state, mesh)
    return sharding._replace(cache=sharding.cache._replace(layers=layers))


def traced_for(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which functions are traced that ask whether `rows_are_divided`."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def rows_are_divided() -> bool:
    """Whether the rows of a batch lie on several devices of the mesh that is traced for."""
    return jax.sharding.get_abstract_mesh().shape.get("data", 1) > 1


def keep_sharded(state: Tree, mesh: Mesh | None) -> Tree:
    """The same `GenerationState` inside a jitted function, which will return it where it lay.

    Otherwise XLA would choose: donated buffers would not fit, and the next call would be compiled
    again.
    """
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, state_sharding(state, mesh))


def _counts(path: str, shape: tuple[int, ...], config: CSMConfig) -> Sequence[int]:
    """Into how many parts each dimension could be split: heads of a group stay together."""
    if "/attn/" not in path:
        return shape
    stack = path.split("/")[1]
    return [getattr(config, stack).num_kv_heads] * len(shape)


def _fitting(wanted: P, counts: Sequence[int], mesh: Mesh) -> P:
    """`wanted`, without the axes that do not divide what they would split."""

    def divides(axes: str | tuple[str, ...], count: int) -> bool:
        names = (axes,) if isinstance(axes, str) else axes
        return count % math.prod(mesh.shape[name] for name in names) == 0

    named = zip(wanted, counts, strict=False)  # dimensions at the end need not be named
    return P(*(axes if axes and divides(axes, count) else None for axes, count in named))


def _sharding(wanted: P, leaf: Any, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, _fitting(wanted, leaf.shape, mesh))
