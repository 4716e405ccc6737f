"""The types that a model is held and computed in, and which of them a machine is good at."""

import enum
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from csm_jax.errors import InputError

# A `jax.Device`, an alias in jax that type checkers do not resolve.
Device = Any

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZE = ("none", "int8")


class Role(enum.Enum):
    """The use of a parameter, which decides its type."""

    MATRIX = "multiplied with activations"
    MATRIX_STACK = "matrices of which an index picks one"
    TABLE = "rows of which an index picks one"
    NORM = "scale of a norm"
    MATRIX_SCALE = "scales of an int8 matrix"
    CODEC = "float32 in every precision"


# Every path (of `native_format.flatten`) matches one pattern as a whole.
_ROLES = (
    (r"csm/(text|audio)_embedding", Role.TABLE),
    (r"csm/depth_heads/weight", Role.MATRIX_STACK),
    (r"csm/(projection|codebook0_head|.+/(attn|mlp)/\w+)/weight", Role.MATRIX),
    (r"csm/.+/weight_scale", Role.MATRIX_SCALE),
    (r"csm/.+norm/scale", Role.NORM),
    (r"codec/.+", Role.CODEC),
)


def role_of(path: str) -> Role:
    """The role of a parameter, such as "csm/backbone/norm/scale"."""
    (role,) = (role for pattern, role in _ROLES if re.fullmatch(pattern, path))
    return role


@dataclass(frozen=True)
class Precision:
    """The types that a model is held and computed in.

    Attributes:
      weights: of matrices and embeddings.
      activations: of everything between products, of norms and of the KV cache.
      int8: matrices are int8 instead, with a float32 scale per output channel.
      packs_tables: tables and stacks of matrices are held as the bits of bfloat16 (`layers.pack`),
        because a CPU picks an entry of them much faster.
    """

    weights: jnp.dtype
    activations: jnp.dtype
    int8: bool = False
    packs_tables: bool = False

    def __str__(self) -> str:
        kinds = [*["int8"] * self.int8, str(self.weights)]
        if self.activations != self.weights:
            kinds.append(f"computed in {self.activations}")
        return " ".join(kinds)

    def dtype_of(self, role: Role) -> jnp.dtype:
        """The type of a parameter that is neither int8 nor packed."""
        if role in (Role.MATRIX_SCALE, Role.CODEC):
            return jnp.dtype(jnp.float32)
        return self.activations if role is Role.NORM else self.weights

    def quantizes(self, role: Role) -> bool:
        """Whether parameters of this role are held as int8."""
        return self.int8 and role in (Role.MATRIX, Role.MATRIX_STACK)

    def packs(self, role: Role) -> bool:
        """Whether parameters of this role are held as bits."""
        is_picked = role in (Role.TABLE, Role.MATRIX_STACK)
        return self.packs_tables and is_picked and not self.quantizes(role)


FLOAT32 = Precision(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))


def resolve(dtype: DTypeLike | None = "auto", quantize: str = "none") -> Precision:
    """The precision that a type, or its name, means on this machine; "auto" is the best one here.

    A CPU computes in float32 whatever the weights are: it widens narrow types at every step. In
    int8 only embeddings are left of the weights, and "auto" takes them in half the memory.

    Raises:
      InputError: another type or name.
    """
    if quantize not in QUANTIZE:
        raise InputError(f"quantize is {quantize}, but must be {' or '.join(QUANTIZE)}")
    device, int8 = jax.devices()[0], quantize == "int8"
    name = dtype if isinstance(dtype, str) else _name(dtype)
    if name == "auto":
        name = _best_dtype(device, int8)
    if name not in DTYPES:
        raise InputError(f"dtype is {name}, but must be auto, float32, bfloat16 or float16")
    weights = jnp.dtype(name)
    if device.platform == "cpu":
        is_bfloat16 = weights == jnp.bfloat16
        return Precision(weights, jnp.dtype(jnp.float32), int8, packs_tables=is_bfloat16)
    return Precision(weights, weights, int8)


def _name(dtype: Any) -> str:
    """The name of a type as JAX and numpy users write it, such as `jnp.bfloat16`."""
    try:
        return str(dtype) if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _best_dtype(device: Device, int8: bool) -> str:
    if device.platform == "cpu":
        return "bfloat16" if int8 else "float32"
    capability = getattr(device, "compute_capability", None)
    # Before Ampere (8.0), for one on the T4, CUDA emulates bfloat16.
    is_old_gpu = device.platform == "gpu" and capability and float(capability) < 8
    return "float16" if is_old_gpu else "bfloat16"
