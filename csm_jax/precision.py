"""The types that a model is held and computed in, and which of them a machine is good at."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from csm_jax.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZE = ("none", "int8")


@dataclass(frozen=True)
class Precision:
    """What a model is held and computed in.

    Attributes:
      weights: of matrices and embeddings.
      activations: of everything between products, of norms and of the KV cache.
      int8: matrices are int8 instead, with a float32 scale per output channel.
    """

    weights: jnp.dtype
    activations: jnp.dtype
    int8: bool = False

    @property
    def packs_tables(self) -> bool:
        """Whether bfloat16 tables are held as their bits (`layers.pack`): where a CPU computes."""
        return self.weights == jnp.bfloat16 and self.activations == jnp.float32


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
    activations = jnp.dtype(jnp.float32) if device.platform == "cpu" else weights
    return Precision(weights, activations, int8)


def _name(dtype: Any) -> str:
    """The name of a type as JAX and numpy users write it, such as `jnp.bfloat16`."""
    try:
        return str(dtype) if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        return str(dtype)


def _best_dtype(device: jax.Device, int8: bool) -> str:
    if device.platform == "cpu":
        return "bfloat16" if int8 else "float32"
    capability = getattr(device, "compute_capability", None)
    # Before Ampere (8.0), for one on the T4, CUDA emulates bfloat16.
    is_old_gpu = device.platform == "gpu" and capability and float(capability) < 8
    return "float16" if is_old_gpu else "bfloat16"
