"""The numbers are those of jax's own generator, whatever a process has set jax to."""

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.model.random_numbers import random_key, uniform_numbers


def test_numbers_are_those_of_jax():
    expected = jax.random.uniform(jax.random.key(7, impl="threefry2x32"), (5,), jnp.float32)
    np.testing.assert_array_equal(uniform_numbers(random_key(7), 5), expected)


def test_numbers_do_not_depend_on_settings():
    usual = np.asarray(uniform_numbers(random_key(7), 5))
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(uniform_numbers(random_key(7), 5), usual)
        others = jax.random.uniform(jax.random.key(7), (5,), jnp.float32)
    assert not np.array_equal(others, usual)
