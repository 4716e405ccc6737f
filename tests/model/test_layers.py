"""Layers against their definitions, in every type."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from csm_jax import config
from csm_jax.config import RopeScaling
from csm_jax.model.kv_cache import LayerCache, _write_one_position
from csm_jax.model.layers import (
    Int8Weight,
    LayerNorm,
    RMSNorm,
    _attention_by_sums,
    _by_widened_weights,
    _turns,
    _turns_from_table,
    apply_rope,
    attention,
    linear,
    linear_float32,
    lookup,
    pack,
    quantize_int8,
    rope_frequencies,
)

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def normal(seed: int, *shape: int, dtype=np.float32, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(dtype)


def float64(*arrays) -> list[np.ndarray]:
    return [np.asarray(x).astype(np.float64) for x in arrays]


def assert_rounded(got, expected: np.ndarray, dtype, roundings: int = 1, atol: float = 0.0):
    """Checks that `got` is `expected` up to this many roundings to `dtype` and float32 noise."""
    assert got.dtype == dtype
    eps = float(ml_dtypes.finfo(dtype).eps)
    rtol = max(roundings * eps / 2, 1e-5) * 1.01
    np.testing.assert_allclose(*float64(got), expected, rtol=rtol, atol=atol)


@every_dtype
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5), (2, 3, 5)])
def test_linear_is_x_times_the_transposed_weight(dtype, shape):
    x, weight = normal(0, *shape, dtype=dtype), normal(1, 4, 5, dtype=dtype)
    x64, weight64 = float64(x, weight)
    expected = np.einsum("...i,oi->...o", x64, weight64)
    assert_rounded(linear(x, weight), expected, dtype, atol=1e-5)
    got = linear_float32(x, weight)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@every_dtype
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_linear_accumulates_in_float32(dtype, rows):
    """Sums 8192 ones: bfloat16 counts to 256, float16 to 2048. One row has its own product."""
    ones, weight = np.ones((rows, 8192), dtype), np.ones((3, 8192), dtype)
    got = jax.jit(linear)(ones, weight)
    np.testing.assert_array_equal(float64(got)[0], np.full((rows, 3), 8192.0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5)], ids=str)
def test_float32_activations_are_rounded_to_the_type_of_narrow_weights(dtype, shape):
    """On a CPU the product rounds its inputs to the weights' type, and nothing else."""
    x, weight = normal(0, *shape), normal(1, 4, 5, dtype=DTYPES[dtype])
    x64, weight64 = float64(x.astype(DTYPES[dtype]), weight)
    got = jax.jit(linear)(x, weight)
    assert got.dtype == np.float32
    expected = np.einsum("...i,oi->...o", x64, weight64)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_packing_and_unpacking_a_table_is_exact():
    """All bit patterns of bfloat16, in a table of vectors and in one of matrices."""
    bits = np.random.default_rng(0).integers(0, 2**16, (6, 4, 5), np.uint16)
    table = bits.view(ml_dtypes.bfloat16)
    packed = pack(jnp.asarray(table))
    assert packed.dtype == np.uint16
    np.testing.assert_array_equal(packed, bits)
    for index in (3, np.array([5, 0, 5])):
        rows = jax.jit(lookup)(packed, index)
        assert rows.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.asarray(rows).view(np.uint16), bits[index])
        plain = np.asarray(lookup(jnp.asarray(table), index))
        np.testing.assert_array_equal(plain.astype(np.float32), table[index].astype(np.float32))


@every_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm_equals_its_definition(dtype, scale):
    """Squares of 1e3 overflow float16."""
    x = normal(2, 3, 4, 40, dtype=dtype, scale=scale)
    norm = RMSNorm(40, 1e-5, dtype=dtype)
    norm.scale[...] = jnp.asarray(normal(3, 40, dtype=dtype))
    x64, scale64 = float64(x, norm.scale[...])
    expected = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-5) * scale64
    assert_rounded(norm(x), expected, dtype, roundings=2, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_layer_norm_equals_its_definition(dtype, shift):
    x = (normal(4, 3, 4, 40) + shift).astype(dtype)
    norm = LayerNorm(40, 1e-5, dtype=dtype)
    norm.scale[...], norm.bias[...] = (jnp.asarray(normal(s, 40, dtype=dtype)) for s in (5, 6))
    x64, scale64, bias64 = float64(x, norm.scale[...], norm.bias[...])
    centered = x64 - x64.mean(axis=-1, keepdims=True)
    product = centered / np.sqrt(x64.var(axis=-1, keepdims=True) + 1e-5) * scale64
    # A bias of the opposite sign gives a small sum with the rounding errors of large terms.
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert_rounded(norm(x), product + bias64, dtype, atol=max(eps * np.abs(product).max(), 1e-5))


# --- RoPE ---------------------------------------------------------------------------------------

SCALINGS = {
    "csm_1b backbone": (64, config.csm_1b().backbone.rope_scaling),
    "csm_1b depth decoder": (128, config.csm_1b().depth_decoder.rope_scaling),
    "tiny": (8, config.tiny().backbone.rope_scaling),
    "llama 3.1": (128, RopeScaling(8.0, 1.0, 4.0, 8192)),
}


@pytest.mark.parametrize("head_dim", [6, 8, 64, 128])
def test_plain_rope_frequencies_equal_their_definition(head_dim):
    expected = [500_000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    got = rope_frequencies(head_dim, 500_000.0)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(("head_dim", "scaling"), SCALINGS.values(), ids=SCALINGS.keys())
def test_llama3_scaling_equals_its_piecewise_definition(head_dim, scaling):
    """The definition is `apply_scaling` of the Llama 3.1 release, in float64."""
    got = rope_frequencies(head_dim, 500_000.0, scaling)
    regions = set()
    for i, frequency in enumerate(got):
        plain = 500_000.0 ** (-2 * i / head_dim)
        wavelength = 2 * np.pi / plain
        if wavelength < scaling.original_max_seq_len / scaling.high_freq_factor:
            regions.add("kept")
            expected = plain
        elif wavelength > scaling.original_max_seq_len / scaling.low_freq_factor:
            regions.add("stretched")
            expected = plain / scaling.factor
        else:
            regions.add("between")
            span = scaling.high_freq_factor - scaling.low_freq_factor
            turns = scaling.original_max_seq_len / wavelength
            smooth = (turns - scaling.low_freq_factor) / span
            expected = (1 - smooth) * plain / scaling.factor + smooth * plain
        np.testing.assert_allclose(frequency, expected, rtol=1e-6)
    assert regions == {"kept", "stretched", "between"}


def test_the_scaling_of_the_hugging_face_config_gives_equal_frequencies():
    sesame = config.csm_1b().backbone.rope_scaling
    expected = rope_frequencies(64, 500_000.0, sesame)
    for same in (
        RopeScaling(32.0, 0.125, 0.5, 1024),
        RopeScaling(32.0, 0.001953125, 0.0078125, 16),
    ):
        np.testing.assert_allclose(rope_frequencies(64, 500_000.0, same), expected, rtol=1e-6)


@every_dtype
def test_rope_equals_a_rotation_of_complex_numbers(dtype):
    """Pairs (i, i + H/2) are complex numbers, multiplied by e^(i * position * frequency)."""
    head_dim = 8
    x = normal(7, 2, 5, 3, head_dim, dtype=dtype)
    positions = np.array([[0, 1, 2, 3, 4], [2043, 2044, 2045, 2046, 2047]], np.int32)
    frequencies = rope_frequencies(head_dim, 500_000.0)
    (x64,) = float64(x)
    numbers = x64[..., : head_dim // 2] + 1j * x64[..., head_dim // 2 :]
    angles = positions[:, :, None, None] * frequencies.astype(np.float64)
    turned = numbers * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    # 2047 radians have an error of 6e-5 in float32.
    assert_rounded(apply_rope(x, positions, frequencies), expected, dtype, atol=3e-4)


def test_attention_scores_depend_only_on_the_distance():
    query, key = normal(8, 2, 1, 1, 1, 16)
    frequencies = rope_frequencies(16, 500_000.0, config.csm_1b().backbone.rope_scaling)

    def score(query_at: int, key_at: int) -> float:
        turned = [
            apply_rope(x, np.full((1, 1), at, np.int32), frequencies)
            for x, at in ((query, query_at), (key, key_at))
        ]
        return float(jnp.vdot(*turned))

    np.testing.assert_allclose(score(107, 100), score(7, 0), rtol=1e-4)
    assert abs(score(8, 0) - score(7, 0)) > 1e-2


# --- Attention ----------------------------------------------------------------------------------


def naive_attention(query, key, value, visible) -> np.ndarray:
    query, key, value = float64(query, key, value)
    batch, length, kv_heads, group, head_dim = query.shape
    out = np.zeros(query.shape)
    all_weights = np.zeros((batch, kv_heads, group, length, key.shape[-1]))
    for b, t, k, g in np.ndindex(batch, length, kv_heads, group):
        seen = np.flatnonzero(visible[b, t])
        scores = [query[b, t, k, g] @ key[b, k, :, s] / head_dim**0.5 for s in seen]
        weights = np.exp(np.array(scores) - max(scores))
        all_weights[b, k, g, t, seen] = weights / weights.sum()
        out[b, t, k, g] = weights / weights.sum() @ value[b, k, :, seen]
    return out, all_weights


def assert_equals_naive_attention(attend, query, key, value, visible) -> None:
    got, weights = jax.jit(attend)(query, key, value, visible)
    expected, expected_weights = naive_attention(query, key, value, visible)
    # Attention weights are rounded too; sums of mixed signs keep the errors of their terms.
    atol = max(3 * float(ml_dtypes.finfo(value.dtype).eps), 1e-5)
    assert_rounded(got, expected, value.dtype, roundings=2, atol=atol)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-5)


@every_dtype
@pytest.mark.parametrize(("num_kv_heads", "group"), [(2, 3), (4, 1), (1, 3)])
def test_attention_equals_a_loop(dtype, num_kv_heads, group):
    query = normal(9, 2, 4, num_kv_heads, group, 8, dtype=dtype, scale=2.0)
    key = normal(10, 2, num_kv_heads, 8, 7, dtype=dtype)
    value = normal(11, 2, num_kv_heads, 8, 7, dtype=dtype)
    visible = np.random.default_rng(12).random((2, 4, 7)) < 0.6
    visible[..., 3] = True
    assert_equals_naive_attention(attention, query, key, value, visible)


@every_dtype
def test_the_attention_of_a_gpu_to_a_short_cache_equals_a_loop(dtype):
    query = normal(9, 2, 1, 2, 3, 8, dtype=dtype, scale=2.0)
    key, value = normal(10, 2, 2, 8, 7, dtype=dtype), normal(11, 2, 2, 8, 7, dtype=dtype)
    visible = np.arange(7)[None, None] < np.array([[[5]], [[7]]])
    assert_equals_naive_attention(_attention_by_sums, query, key, value, visible)


@every_dtype
@pytest.mark.parametrize("count", [1, 3])
def test_the_int8_product_of_a_gpu_equals_that_of_the_widened_weights(dtype, count):
    rows = normal(12, count, 32, dtype=dtype)
    weight = Int8Weight(*quantize_int8(normal(13, 5, 32)))
    got = jax.jit(_by_widened_weights)(rows, weight)
    widened = np.asarray(weight.values) * np.asarray(weight.scale, np.float64)[:, None]
    np.testing.assert_allclose(got, np.asarray(rows, np.float64) @ widened.T, rtol=1e-5, atol=1e-5)


def test_the_turns_of_a_table_equal_those_that_are_computed():
    frequencies = rope_frequencies(16, 500_000)
    positions = np.array([[[0], [1], [31]], [[7], [30], [2]]], np.int32)
    got = jax.jit(lambda x: _turns_from_table(x, frequencies, 32))(positions)
    np.testing.assert_allclose(got, _turns(positions, frequencies), atol=1e-6)


def test_the_write_of_a_gpu_changes_one_position():
    cache = LayerCache(normal(1, 1, 2, 3, 5), normal(2, 1, 2, 3, 5))
    key, value = normal(3, 1, 2, 3, 1), normal(4, 1, 2, 3, 1)
    got = jax.jit(_write_one_position)(cache, key, value, np.array([4], np.int32))
    cache.key[..., 4], cache.value[..., 4] = key[..., 0], value[..., 0]
    np.testing.assert_array_equal(got.key, cache.key)
    np.testing.assert_array_equal(got.value, cache.value)


@every_dtype
def test_the_softmax_of_attention_is_float32(dtype):
    """The weights of 4096 equal keys, added in bfloat16 or float16, would not sum to one."""
    query, key = np.ones((1, 1, 1, 1, 4), dtype), np.ones((1, 1, 4, 4096), dtype)
    value, visible = np.ones((1, 1, 4, 4096), dtype), np.ones((1, 1, 4096), bool)
    got, _ = jax.jit(attention)(query, key, value, visible)
    np.testing.assert_array_equal(float64(got)[0], np.ones((1, 1, 1, 1, 4)))


def test_a_mask_without_a_batch_axis_applies_to_all_rows():
    query, key, value = normal(13, 2, 3, 2, 3, 8), normal(14, 2, 2, 8, 5), normal(15, 2, 2, 8, 5)
    visible = np.tri(3, 5, 2, dtype=bool)[None]
    expected = attention(query, key, value, np.repeat(visible, 2, axis=0))[0]
    np.testing.assert_array_equal(attention(query, key, value, visible)[0], expected)


def test_masked_keys_have_no_effect():
    query, key, value = normal(13, 1, 2, 2, 3, 8), normal(14, 1, 2, 8, 5), normal(15, 1, 2, 8, 5)
    visible = np.array([[[1, 0, 1, 1, 0], [1, 0, 1, 0, 0]]], bool)
    expected = attention(query, key, value, visible)[0]
    key[..., [1, 4]], value[..., [1, 4]] = 1e6, -1e6
    np.testing.assert_array_equal(attention(query, key, value, visible)[0], expected)
    changed = attention(query, key, value, np.ones_like(visible))[0]
    assert not np.allclose(changed, expected)
