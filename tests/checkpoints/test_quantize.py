"""int8: against numpy, in checkpoints, and in a whole model."""

import json
import re

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import CONFIG, TOKENIZER, params

import csm_jax
from csm_jax.checkpoints import native_format
from csm_jax.convert import __main__ as convert
from csm_jax.errors import CheckpointError, InputError
from csm_jax.inference.generator import Generator
from csm_jax.model.csm import bind
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.layers import Int8Weight, linear, linear_float32, quantize_int8
from csm_jax.model.precision import FLOAT32, Precision, resolve

WIDE = jnp.dtype(jnp.float32)
INT8 = Precision(WIDE, WIDE, int8=True)
ROWS = [(40,), (3, 40), (2, 3, 40)]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition: 127 steps to the largest magnitude of each row, rounded to the nearest."""
    x = np.float64(x)
    scale = np.abs(x).max(axis=-1) / 127
    steps = np.rint(x / np.where(scale > 0, scale, 1)[..., None])
    return steps.astype(np.int8), scale.astype(np.float32)


def assert_quantized(values, scale, x: np.ndarray) -> None:
    """Checks for equality, except halfway between two steps, which rounding may send to either."""
    x, values, scale = np.float64(x), np.asarray(values), np.asarray(scale)
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    expected_values, expected_scale = quantized(x)
    np.testing.assert_allclose(scale, expected_scale, rtol=3e-7)
    steps = x / np.where(expected_scale > 0, expected_scale, 1)[..., None]
    is_clear = np.abs(steps % 1 - 0.5) > 1e-4
    assert is_clear.mean() > 0.99
    np.testing.assert_array_equal(values[is_clear], expected_values[is_clear])
    assert np.abs(values - steps).max() < 0.5 + 1e-4


def as_int8(weight: np.ndarray) -> Int8Weight:
    return Int8Weight(*map(jnp.asarray, quantized(weight)))


# --- One matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_quantized_values_equal_the_definition(shape, scale):
    x = normal(0, *shape) * np.float32(scale)
    assert_quantized(*jax.jit(quantize_int8)(x), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_of_narrow_types_are_quantized_like_their_float32_values(dtype):
    x = normal(1, 5, 40).astype(jnp.dtype(dtype))
    for got, expected in zip(quantize_int8(x), quantize_int8(np.float32(x)), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert_quantized(*quantize_int8(x), x)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_the_rounding_error_is_at_most_half_a_step(shape):
    x = normal(2, *shape)
    values, scale = (np.float64(part) for part in quantize_int8(x))
    error = np.abs(values * scale[..., None] - x)
    assert (error <= scale[..., None] / 2 * (1 + 1e-6)).all()
    assert error.max() > 0.4 * scale.min()  # the steps are not finer
    # The largest value of every row is exact; -128, which has no opposite, is not used.
    assert (np.abs(values).max(axis=-1) == 127).all()


def test_quantization_is_symmetric():
    x = normal(3, 7, 40)
    (values, scale), (opposite, same) = quantize_int8(x), quantize_int8(-x)
    np.testing.assert_array_equal(values, -opposite)
    np.testing.assert_array_equal(scale, same)


def test_rows_of_zeros_stay_zero():
    x = normal(4, 3, 40)
    x[1] = 0
    with jax.debug_nans(True):
        values, scale = quantize_int8(x)
    assert not values[1].any()
    assert scale[1] == 0
    for left, right in ((x, normal(5, 6, 40)), (normal(5, 6, 40), x)):
        product = np.asarray(linear(left, as_int8(right)))
        assert np.isfinite(product).all()
        zeros = product[1] if left is x else product[:, 1]
        np.testing.assert_array_equal(zeros, np.zeros(6))


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 40), (3, 40), (2, 3, 40)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_equals_the_integer_product_times_the_scales(shape, dtype):
    """Every row of activations has its own scale; numpy adds 64-bit integers."""
    x, weight = normal(6, *shape).astype(jnp.dtype(dtype)), normal(7, 9, 40)
    values, scale = quantized(x.astype(np.float32))
    weights, weight_scale = quantized(weight)
    sums = np.einsum("...i,oi->...o", values.astype(np.int64), weights.astype(np.int64))
    expected = sums * np.float64(scale)[..., None] * np.float64(weight_scale)
    got = jax.jit(linear_float32)(x, as_int8(weight))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert linear(x, as_int8(weight)).dtype == x.dtype


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_sums_of_a_product_are_integers(rows):
    """Sums up to 8192 products of 127 by 127: int16 would overflow, float32 would round."""
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(1, 128, (count, 8192)) for count in (rows, 99))
    x[:, 0] = weight[:, 0] = 127  # so that a step is 1
    got = jax.jit(linear_float32)(x.astype(np.float32), as_int8(weight))
    np.testing.assert_array_equal(got, (x @ weight.T).astype(np.float32))


@pytest.mark.parametrize("shape", [(1, 40), (20, 40)], ids=str)
def test_the_error_of_a_product_is_bounded_by_half_steps(shape):
    """The bound is |xw - (x + a)(w + b)| with |a| and |b| up to half a step of their rows."""
    x, weight = normal(8, *shape), normal(9, 9, 40)
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    weight_step = np.abs(weight).max(axis=1) / 127
    largest = (
        np.abs(x).sum(axis=1, keepdims=True) * weight_step / 2
        + step / 2 * np.abs(weight).sum(axis=1)
        + x.shape[1] * step * weight_step / 4
    )
    error = np.abs(np.asarray(linear_float32(x, as_int8(weight))) - np.float64(x) @ weight.T)
    assert (error < largest * (1 + 1e-5)).all()
    assert error.max() > 0


# --- Which parameters ---------------------------------------------------------------------------

MATRICES = re.compile(
    r"csm/(codebook0_head|projection|depth_heads"
    r"|(backbone|depth_decoder)/layers/\d/(attn/(qkv|o)|mlp/(gate|up|down)))/weight"
)


def assert_holds(got: dict, weights: str = "float32", norms: str = "float32") -> None:
    """Checks the types of all parameters of an int8 model. bfloat16 may be held as bits."""
    matrices = {path for path in params() if MATRICES.fullmatch(path)}
    assert len(matrices) == 3 + 5 * 5
    assert got.keys() == params().keys() | {f"{path}_scale" for path in matrices}
    for path, original in params().items():
        array = np.asarray(got[path])
        if path in matrices:
            assert_quantized(array, got[f"{path}_scale"], original)
            continue
        dtype = norms if path.endswith("/scale") else weights
        expected = original.astype("float32" if path.startswith("codec/") else jnp.dtype(dtype))
        array = array.view(jnp.bfloat16) if array.dtype == np.uint16 else array
        assert array.dtype == expected.dtype, path
        np.testing.assert_array_equal(array, expected, path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("int8") / "native"
    native_format.save(directory, CONFIG, params().items(), TOKENIZER, int8=True)
    return directory


def flat_params(model: Generator) -> dict:
    codec = {path: array for path, array in params().items() if path.startswith("codec/")}
    return native_format.flatten({"csm": model.params}) | codec


def test_only_matrices_are_quantized(native, directory):
    """On loading and in files. Each channel of each depth head has its own scale."""
    assert_holds(native_format.flatten(fixtures.load_params(native, CONFIG, INT8)))
    assert native_format.is_int8(directory)
    assert not native_format.is_int8(native)
    assert_holds(native_format.flatten(fixtures.load_params(directory, CONFIG, INT8)))
    assert_holds(dict(native_format.read_params(directory, CONFIG)))


def test_quantized_shapes_are_known_before_loading(directory):
    told = native_format.flatten(native_format.param_shapes(CONFIG, INT8))
    got = native_format.flatten(fixtures.load_params(directory, CONFIG, INT8))
    assert {path: (x.shape, x.dtype) for path, x in got.items()} == {
        path: (x.shape, x.dtype) for path, x in told.items()
    }


@pytest.mark.parametrize("config", [csm_jax.tiny(), csm_jax.csm_1b()], ids=["tiny", "csm_1b"])
def test_int8_parameters_take_a_third_of_the_memory(config):
    """A weight takes a byte and a channel four; embeddings are bfloat16, norms float32."""
    stacks = config.backbone, config.depth_decoder
    matrices = [(config.audio_vocab_size, config.backbone.embed_dim)]
    matrices += [(config.depth_decoder.embed_dim, config.backbone.embed_dim)]
    heads = (config.num_codebooks - 1) * config.audio_vocab_size
    matrices += [(heads, config.depth_decoder.embed_dim)]
    for stack in stacks:
        width, queries = stack.embed_dim, stack.num_heads * stack.head_dim
        keys = stack.num_kv_heads * stack.head_dim
        layer = [(queries + 2 * keys, width), (width, queries), (width, stack.mlp_dim)]
        matrices += (layer + [(stack.mlp_dim, width)] * 2) * stack.num_layers
    embeddings = config.text_vocab_size + config.num_codebooks * config.audio_vocab_size
    norms = sum((2 * stack.num_layers + 1) * stack.embed_dim for stack in stacks)
    weights, channels = sum(out * width for out, width in matrices), sum(out for out, _ in matrices)
    expected = weights + 4 * channels + 2 * embeddings * config.backbone.embed_dim + 4 * norms

    shapes = native_format.param_shapes(config, resolve("auto", "int8"))["csm"]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert size == expected
    wide = sum(x.size * 4 for x in jax.tree.leaves(native_format.param_shapes(config)["csm"]))
    assert size < (0.36 if config == csm_jax.tiny() else 0.32) * wide


# --- Loading and converting ---------------------------------------------------------------------


def test_a_stored_int8_model_loads_as_int8(directory, native):
    """With or without `quantize`; quantizing the original on loading gives equal parameters."""
    for dtype, weights in (("auto", "bfloat16"), ("float32", "float32")):
        models = [
            flat_params(csm_jax.load(source, dtype, asked))
            for source, asked in ((directory, None), (directory, "int8"), (native, "int8"))
        ]
        assert_holds(models[0], weights)
        for model in models[1:]:
            fixtures.assert_same_params(model, models[0])


def test_full_precision_of_an_int8_model_is_refused(directory):
    with pytest.raises(CheckpointError, match="is stored as int8: for full precision") as error:
        csm_jax.load(directory, quantize="none")
    assert "\n" not in str(error.value)


def test_loading_without_quantize_keeps_float32(native):
    for asked in (None, "none"):
        fixtures.assert_same_params(flat_params(csm_jax.load(native, quantize=asked)), params())


@pytest.mark.parametrize(
    ("flags", "weights"), [([], "float32"), (["--dtype=bfloat16"], "bfloat16")], ids=str
)
def test_a_converted_int8_checkpoint_has_int8_matrices(huggingface, tmp_path, flags, weights):
    out = tmp_path / "out"
    assert convert.run([f"--source={huggingface}", f"--out={out}", "--quantize=int8", *flags]) == 0
    assert json.loads((out / "config.json").read_text())["int8"] is True
    # Norms are stored in the same type, and computed in float32.
    assert_holds(dict(native_format.read_params(out, CONFIG)), weights, norms=weights)


def test_impossible_quantizations_are_refused(directory, huggingface, tmp_path, capsys):
    out = tmp_path / "out"
    for flags, message in (
        ([f"--source={huggingface}", "--quantize=int4"], "quantize is int4, but must be none or"),
        ([f"--source={directory}", "--to=hf"], "is stored as int8, which this layout does not"),
        ([f"--source={directory}", "--quantize=int8"], "is native already"),
    ):
        assert convert.run([*flags, f"--out={out}"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()
    with pytest.raises(InputError, match="quantize is int4, but must be none or int8"):
        csm_jax.load("random:tiny", quantize="int4")


def test_the_types_beside_int8_depend_on_the_platform():
    """On a CPU only embeddings are narrow, which takes half their memory at no cost in time."""
    narrow = Precision(jnp.dtype(jnp.bfloat16), WIDE, int8=True, packs_tables=True)
    assert resolve("auto", "int8") == narrow
    assert resolve("float32", "int8") == INT8
    assert resolve("auto", "none") == resolve() == FLOAT32


# --- The whole model ----------------------------------------------------------------------------


def logits(precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Logits at all positions of a random sequence: codebook 0 [T, V], the others [T, Q - 1, V]."""
    weights = native_format.place_params(params().items(), CONFIG, precision)["csm"]
    rng = np.random.default_rng(0)
    frames = rng.integers(0, CONFIG.audio_vocab_size, (1, 40, CONFIG.num_codebooks + 1), np.int32)
    mask = np.arange(CONFIG.num_codebooks + 1)[None, None] < CONFIG.num_codebooks

    @jax.jit
    def run(weights):
        model = bind(CONFIG, weights)
        cache = KVCache.create(CONFIG.backbone, 1, 40, WIDE, num_lengths=1)
        embedded = model.embed(jnp.asarray(frames), jnp.broadcast_to(mask, frames.shape))
        hidden, _ = model.backbone(embedded, cache)
        depth = model.depth_logits(hidden[0], jnp.asarray(frames[0, :, :-1]))
        return model.backbone_logits(hidden[0]), depth

    return jax.tree.map(np.asarray, run(weights))


def test_logits_stay_close_to_those_of_float32():
    """Rounding to steps of max / 127 is an error of max / (127 sqrt 12), that is of
    (max / rms) / 440 of an operand; with max / rms about 2.5, a product of two is off by 0.8 %.
    About 3 of them in sequence in each of 3 layers (2 in the depth decoder, after the backbone's
    3), being independent, give sqrt(9) x 0.8 % and sqrt(15) x 0.8 %; the limits are half as much
    again."""
    for wide, int8, bound in zip(logits(FLOAT32), logits(INT8), (0.036, 0.047), strict=True):
        error = np.std(int8 - wide) / np.std(wide)
        assert 1e-3 < error < bound


def test_a_stored_int8_model_generates(directory):
    options = dict(max_audio_length_ms=640, guard="off", seed=3, notify=lambda notice: None)
    model = csm_jax.load(directory)
    codes = model.generate_codes("Hello.", **options)
    assert codes.shape == (8, CONFIG.num_codebooks)
    assert np.isfinite(model.decode(codes)).all()
    again = csm_jax.load(directory, quantize="int8").generate_codes("Hello.", **options)
    np.testing.assert_array_equal(again, codes)
