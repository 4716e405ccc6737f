"""Random numbers that depend on their seed alone, and not on what jax is set to in a process."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from csm_jax.model.layers import Array


def random_key(seed: ArrayLike) -> Array:
    """The key of a seed; `JAX_DEFAULT_PRNG_IMPL` would choose another generator."""
    return jax.random.key(seed, impl="threefry2x32")


def uniform_numbers(key: Array, length: int) -> Array:
    """Numbers in [0, 1), float32 [length], of one key.

    The type is named because others are drawn where jax's default is float64, and so is the form of
    the generator, which `JAX_THREEFRY_PARTITIONABLE` would choose.
    """
    with jax.threefry_partitionable(True):
        return jax.random.uniform(key, (length,), jnp.float32)
