"""Converts stored parameters to the types of a `Precision`.

int8 is symmetric, with a scale per output channel; activations are quantized per row where they
are used (`layers.linear`). Embeddings and norms stay: they are looked up or multiplied, never
summed over, so nothing would be faster for it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.model.layers import PACKED, Array, quantize_int8
from csm_jax.model.precision import Precision, role_of


def prepare(
    path: str, tensor: Array | np.ndarray, precision: Precision
) -> dict[str, Array | np.ndarray]:
    """Converts one parameter of the model: to the right type, or to int8 and its scale.

    Args:
      path: as of `native_format.flatten`.
      tensor: in any float type; or int8 already, or such a tensor's scale.
    """
    role = role_of(path)
    if tensor.dtype == jnp.int8:
        return {path: tensor}
    if precision.quantizes(role):
        values, scale = _quantize(tensor)
        return {path: values, f"{path}_scale": scale}
    tensor = tensor.astype(precision.dtype_of(role), copy=False)
    return {path: _pack(tensor) if precision.packs(role) else tensor}


# One program per shape: the float32 copy of a matrix is never in memory as a whole.
_quantize = jax.jit(quantize_int8)


def _pack(table: Array | np.ndarray) -> Array:
    """`layers.pack` of a table on a CPU, where its bits are there already."""
    return jax.device_put(np.asarray(table).view(PACKED))
