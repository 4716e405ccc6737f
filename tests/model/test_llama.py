"""The Llama stack and its KV cache: any split of a sequence into calls gives equal states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from csm_jax import config
from csm_jax.config import LlamaConfig
from csm_jax.model import kv_cache as kv
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.llama import Llama
from csm_jax.model.precision import FLOAT32, Precision

STACKS = {"backbone": config.tiny().backbone, "depth_decoder": config.tiny().depth_decoder}
SLOTS = 16
BACKBONE = STACKS["backbone"]


@functools.cache
def stack(
    llama: LlamaConfig = BACKBONE,
    weights: str = "float32",
    activations: str = "float32",
    rounded_to: str = "float32",
):
    """A compiled stack with random weights: (inputs, cache, kv_length) -> (states, cache)."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=leaf.shape) * leaf.shape[-1] ** -0.5
        if len(leaf.shape) == 1:
            values += 1
        return jnp.asarray(values.astype(jnp.dtype(rounded_to)), leaf.dtype)

    precision = Precision(jnp.dtype(weights), jnp.dtype(activations))
    abstract = nnx.eval_shape(lambda: Llama(llama, precision=precision, rngs=nnx.Rngs(0)))
    graph, shapes = nnx.split(abstract)
    state = jax.tree.map(draw, shapes)

    @functools.partial(jax.jit, static_argnums=2)
    def step(x, cache: KVCache, kv_length: int | None = None):
        return nnx.merge(graph, state)(x, cache, kv_length)

    return step


def inputs(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


def empty(batch: int, llama: LlamaConfig = BACKBONE, dtype: str = "float32") -> KVCache:
    """An empty cache with a length for every row."""
    return KVCache.create(llama, batch, SLOTS, jnp.dtype(dtype), num_lengths=batch)


def in_chunks(step, x, cache: KVCache, sizes) -> tuple[np.ndarray, KVCache]:
    states, start = [], 0
    for size in sizes:
        y, cache = step(x[:, start : start + size], cache)
        states.append(np.asarray(y))
        start += size
    assert start == x.shape[1]
    return np.concatenate(states, axis=1), cache


def close(got, expected, atol: float = 2e-5):
    np.testing.assert_allclose(got, expected, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("sizes", [[1] * 6, [2] * 3, [3] * 2, [1, 3, 2]], ids=str)
def test_chunks_equal_one_pass(name, sizes):
    llama = STACKS[name]
    x = inputs(2, 6, llama.embed_dim)
    whole, full = stack(llama)(x, empty(2, llama))
    chunked, filled = in_chunks(stack(llama), x, empty(2, llama), sizes)
    close(chunked, whole)
    np.testing.assert_array_equal(filled.lengths, [6, 6])
    for expected, got in zip(jax.tree.leaves(full), jax.tree.leaves(filled), strict=True):
        close(got, expected)


def test_states_depend_on_position_and_order():
    """The equality above is meaningful, since states depend on more than single inputs."""
    x = inputs(2, 6, BACKBONE.embed_dim)
    states, _ = stack()(x, empty(2))
    swapped, _ = stack()(x[:, [1, 0, 2, 3, 4, 5]], empty(2))
    alone, _ = stack()(x[:, 5:], empty(2))
    assert np.abs(states[:, 5] - swapped[:, 5]).max() > 1e-2
    assert np.abs(states[:, 5] - alone[:, 0]).max() > 1e-2


def test_later_inputs_do_not_change_earlier_states():
    x = inputs(2, 6, BACKBONE.embed_dim)
    states, _ = stack()(x, empty(2))
    for at in range(6):
        other = x.copy()
        other[:, at] += 1
        changed, _ = stack()(other, empty(2))
        np.testing.assert_array_equal(changed[:, :at], states[:, :at])
        assert np.all(np.abs(changed[:, at:] - states[:, at:]).max(axis=-1) > 1e-4)


def test_states_that_are_returned_are_computed_anyway():
    """Asking for them adds outputs to the program, and not a single operation."""
    abstract = nnx.eval_shape(lambda: Llama(BACKBONE, precision=FLOAT32, rngs=nnx.Rngs(0)))
    graph, shapes = nnx.split(abstract)
    x = jax.ShapeDtypeStruct((2, 3, BACKBONE.embed_dim), jnp.float32)

    def traced(layers: tuple[int, ...]):
        def run(params, x, cache):
            return nnx.merge(graph, params).attend(x, cache, layers=layers)

        return jax.make_jaxpr(run)(shapes, x, empty(2)).jaxpr

    everything = tuple(range(BACKBONE.num_layers + 1))
    plain, watched = traced(()), traced(everything)
    assert str(plain.eqns) == str(watched.eqns)
    assert len(watched.outvars) == len(plain.outvars) + len(everything)


@pytest.mark.parametrize("lengths", [[1, 6], [4, 2]], ids=str)
@pytest.mark.parametrize("padding", [0.0, 1e3, -1e3])
def test_ragged_rows_equal_the_same_rows_alone(lengths, padding):
    """A right-padded prompt is followed by single steps, which start at the length of each row."""
    prompt, steps = inputs(2, 6, BACKBONE.embed_dim), inputs(2, 3, BACKBONE.embed_dim, seed=1)
    for row, length in enumerate(lengths):
        prompt[row, length:] = padding
    together, cache = stack()(prompt, empty(2))
    cache = cache._replace(lengths=jnp.asarray(lengths, jnp.int32))
    continued, cache = in_chunks(stack(), steps, cache, [1, 1, 1])
    np.testing.assert_array_equal(cache.lengths, np.array(lengths) + 3)
    for row, length in enumerate(lengths):
        alone = np.concatenate([prompt[row, :length], steps[row]])[None]
        expected, _ = in_chunks(stack(), alone, empty(1), [1] * (length + 3))
        close(together[row, :length], expected[0, :length])
        close(continued[row], expected[0, length:])


def test_unused_cache_positions_have_no_effect():
    x = inputs(2, 5, BACKBONE.embed_dim)
    clean = empty(2)
    dirty = jax.tree.map(lambda leaf: leaf + 1e3 if leaf.ndim == 4 else leaf, clean)
    expected, _ = in_chunks(stack(), x, clean, [3, 1, 1])
    got, _ = in_chunks(stack(), x, dirty, [3, 1, 1])
    np.testing.assert_array_equal(got, expected)


def test_the_size_of_the_cache_has_no_effect():
    x = inputs(2, 6, BACKBONE.embed_dim)
    fits = KVCache.create(BACKBONE, 2, 6, jnp.float32, num_lengths=2)
    close(stack()(x, fits)[0], stack()(x, empty(2))[0])


def test_one_length_for_all_rows_equals_equal_lengths_for_each():
    x = inputs(2, 6, BACKBONE.embed_dim)
    shared = KVCache.create(BACKBONE, 2, SLOTS, jnp.float32, num_lengths=1)
    expected, filled = in_chunks(stack(), x, empty(2), [3, 1, 2])
    got, together = in_chunks(stack(), x, shared, [3, 1, 2])
    close(got, expected)
    np.testing.assert_array_equal(together.lengths, [6])
    for left, right in zip(together.layers, filled.layers, strict=True):
        close(left.key, right.key)
        close(left.value, right.value)


@pytest.mark.parametrize("kv_length", [6, 7, 15, SLOTS])
def test_a_kv_length_that_covers_all_positions_gives_equal_states(kv_length):
    """The cache holds six positions; the rest of it is not read."""
    x = inputs(2, 6, BACKBONE.embed_dim)
    expected, full = in_chunks(stack(), x, empty(2), [4, 1, 1])
    cache, states = empty(2), []
    cache = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.ndim == 4 else leaf, cache)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        cache = cache._replace(layers=tuple(blank_unread(c, kv_length) for c in cache.layers))
        y, cache = stack()(x[:, start:end], cache, kv_length)
        states.append(y)
    close(np.concatenate(states, axis=1), expected)
    for got, wanted in zip(cache.layers, full.layers, strict=True):
        close(got.key[..., :6], wanted.key[..., :6])
        close(got.value[..., :6], wanted.value[..., :6])


def blank_unread(layer: kv.LayerCache, kv_length: int) -> kv.LayerCache:
    """Replaces NaN up to `kv_length` by zeros; NaN beyond would show in the states if read."""
    return kv.LayerCache(
        layer.key.at[..., :kv_length].set(jnp.nan_to_num(layer.key[..., :kv_length])),
        layer.value.at[..., :kv_length].set(jnp.nan_to_num(layer.value[..., :kv_length])),
    )


def test_a_kv_length_that_is_too_short_changes_the_states():
    x = inputs(2, 6, BACKBONE.embed_dim)
    _, cache = stack()(x[:, :5], empty(2))
    step = stack()
    whole, short = (step(x[:, 5:], cache, kv_length)[0] for kv_length in (None, 4))
    assert np.abs(whole - short).max() > 1e-2


def test_a_step_keeps_the_shapes_and_types_of_the_cache():
    cache = empty(2)
    assert len(cache.layers) == BACKBONE.num_layers
    for array in cache.layers[0]:
        assert array.shape == (2, BACKBONE.num_kv_heads, BACKBONE.head_dim, SLOTS)
    for length in (3, 1, 1):
        _, after = stack()(inputs(2, length, BACKBONE.embed_dim), cache)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, cache)
        cache = after


@pytest.mark.parametrize(
    ("write", "starts"),
    [
        (kv.write, [3, 1]),
        (kv.write, [2]),
        (kv._write_rows_in_turn, [3, 1]),
        (kv._write_values_in_a_loop, [2]),
    ],
    ids=["rows", "alike", "tpu", "cpu"],
)
def test_write_puts_each_row_at_its_start(write, starts):
    """A scalar start applies to all rows."""
    rng = np.random.default_rng(0)
    new = rng.normal(size=(2, 2, 3, 4, 2)).astype(np.float32)  # a key and a value, T = 2
    cache = kv.LayerCache(*jnp.zeros((2, 2, 3, 4, 5)))
    written = write(cache, *new, jnp.array(starts, jnp.int32))
    expected = np.zeros((2, 2, 3, 4, 5))
    for row, start in enumerate(np.broadcast_to(starts, 2)):
        expected[:, row, :, :, start : start + 2] = new[:, row]
    np.testing.assert_array_equal(written, expected)


# (weights, activations): limit of the mean error of states of about unit size.
TYPES = {
    ("float32", "float32"): 1e-5,
    ("float16", "float16"): 2e-3,
    ("bfloat16", "bfloat16"): 2e-2,
    # Only the inputs of products are rounded, not the residual stream.
    ("float16", "float32"): 1e-3,
    ("bfloat16", "float32"): 5e-3,
}


@pytest.mark.parametrize(("weights", "activations"), TYPES)
def test_narrow_types_stay_close_to_float32(weights, activations):
    """States keep the type of the activations and the accuracy of the narrow type."""
    x = inputs(2, 6, BACKBONE.embed_dim, dtype=activations)
    step = stack(BACKBONE, weights, activations, rounded_to=weights)
    states, cache = in_chunks(step, x, empty(2, dtype=activations), [3, 3])
    layer = cache.layers[0]
    assert states.dtype == layer.key.dtype == layer.value.dtype == activations
    wide = stack(BACKBONE, rounded_to=weights)
    expected, _ = wide(x.astype(np.float32), empty(2))
    difference = np.abs(states.astype(np.float32) - expected).mean()
    assert difference < TYPES[weights, activations]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 6), (5, 1)])
def test_chunks_equal_one_pass_with_other_groupings_of_heads(num_heads, num_kv_heads):
    llama = dataclasses.replace(
        BACKBONE, num_layers=1, num_heads=num_heads, num_kv_heads=num_kv_heads, rope_scaling=None
    )
    x = inputs(2, 4, llama.embed_dim)
    whole, _ = stack(llama)(x, empty(2, llama))
    chunked, _ = in_chunks(stack(llama), x, empty(2, llama), [2, 2])
    close(chunked, whole)
