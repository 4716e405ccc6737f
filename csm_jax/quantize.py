"""From parameters as they are stored to parameters as a `Precision` wants them.

int8 is symmetric, with a scale per output channel; activations are quantised per row where they
are used (`layers.linear`). Embeddings and norms stay: they are looked up or multiplied, never
summed over, so nothing would be faster for it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.layers import PACKED, quantize_int8
from csm_jax.precision import Precision

Array = jax.Array


def prepare(path: str, tensor: Array, precision: Precision) -> dict[str, Array]:
    """What one parameter of the model becomes: itself in the right type, or int8 and its scale.

    Args:
      path: as of `checkpoint.flatten`.
      tensor: in any float type; or int8 already, or such a tensor's scale.
    """
    name = path.rpartition("/")[2]
    if path.startswith("codec/") or name == "weight_scale":
        return {path: tensor.astype(jnp.float32, copy=False)}
    if name == "weight" and tensor.dtype == jnp.int8:
        return {path: tensor}
    if name == "weight" and precision.int8:
        values, scale = _quantize(tensor)
        return {path: values, f"{path}_scale": scale}
    if name == "scale":
        return {path: tensor.astype(precision.activations, copy=False)}
    tensor = tensor.astype(precision.weights, copy=False)
    return {path: _pack(tensor) if precision.packs_tables and is_table(path) else tensor}


def is_table(path: str) -> bool:
    """Whether a parameter is looked up by an index: an embedding, or the stack of depth heads."""
    return path.endswith("_embedding") or "depth_heads" in path


# One program per shape: the float32 copy of a matrix is never in memory as a whole.
_quantize = jax.jit(quantize_int8)


def _pack(table: Array) -> Array:
    """`layers.pack` of a table on a CPU, where its bits are there already."""
    return jax.device_put(np.asarray(table).view(PACKED))
