"""The codec: causal layers, streams that equal whole recordings, and the quantizer."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from csm_jax.config import tiny
from csm_jax.convert import mimi as tables
from csm_jax.convert.rules import convert, invert
from csm_jax.errors import CheckpointError, InputError
from csm_jax.mimi import Codec, Mimi, codec
from csm_jax.mimi.conv import Chain, Conv1d, ConvTranspose1d, Elu, ReplicateConv1d, StreamingLayer
from csm_jax.mimi.quantizer import ResidualQuantizer, SplitQuantizer, nearest
from csm_jax.mimi.seanet import Decoder, Encoder, ResidualBlock
from csm_jax.mimi.transformer import Transformer, TransformerLayer

CONFIG = tiny().codec
DIM = CONFIG.embed_dim
FRAME = CONFIG.frame_size


class EncodeLayers(Chain):
    """The layers of the codec before the quantizer."""

    def __init__(self, config, *, rngs):
        mimi = Mimi(config, rngs=rngs)
        super().__init__([mimi.encoder, mimi.encoder_transformer, mimi.downsample])


class DecodeLayers(Chain):
    """The layers of the codec after the quantizer."""

    def __init__(self, config, *, rngs):
        mimi = Mimi(config, rngs=rngs)
        super().__init__([mimi.upsample, mimi.decoder_transformer, mimi.decoder])


# Name: constructor of the layer, its channels, and the number of inputs of its smallest block.
LAYERS = {
    "elu": (lambda rngs: Elu(), 3, 1),
    "conv": (lambda rngs: Conv1d(3, 5, 7, rngs=rngs), 3, 1),
    "pointwise": (lambda rngs: Conv1d(3, 5, 1, rngs=rngs), 3, 1),
    "strided": (lambda rngs: Conv1d(3, 5, 8, stride=4, rngs=rngs), 3, 4),
    "odd_stride": (lambda rngs: Conv1d(3, 5, 10, stride=5, rngs=rngs), 3, 5),
    "dilated": (lambda rngs: Conv1d(3, 5, 3, dilation=4, rngs=rngs), 3, 1),
    "no_bias": (lambda rngs: Conv1d(3, 5, 3, use_bias=False, rngs=rngs), 3, 1),
    "replicate": (lambda rngs: ReplicateConv1d(3, 5, 4, stride=2, rngs=rngs), 3, 2),
    "long_replicate": (lambda rngs: ReplicateConv1d(3, 5, 12, stride=2, rngs=rngs), 3, 2),
    "transposed": (lambda rngs: ConvTranspose1d(3, 5, 8, stride=4, rngs=rngs), 3, 1),
    "three_taps": (lambda rngs: ConvTranspose1d(3, 5, 6, stride=2, rngs=rngs), 3, 1),
    "one_tap": (lambda rngs: ConvTranspose1d(3, 5, 4, stride=4, rngs=rngs), 3, 1),
    "depthwise": (lambda rngs: ConvTranspose1d(6, 6, 4, stride=2, depthwise=True, rngs=rngs), 6, 1),
    "residual_block": (lambda rngs: ResidualBlock(CONFIG, 8, 3, rngs=rngs), 8, 1),
    "transformer": (lambda rngs: Transformer(CONFIG, rngs=rngs), DIM, 1),
    "encoder": (lambda rngs: Encoder(CONFIG, rngs=rngs), 1, CONFIG.hop_length),
    "decoder": (lambda rngs: Decoder(CONFIG, rngs=rngs), DIM, 1),
    "encode": (lambda rngs: EncodeLayers(CONFIG, rngs=rngs), 1, FRAME),
    "decode": (lambda rngs: DecodeLayers(CONFIG, rngs=rngs), DIM, 1),
}
# Blocks of each step; in all there are more than positions in the attention window.
NUM_BLOCKS = 12
STEPS = {"ones": [1] * 12, "uneven": [2, 1, 3, 3, 1, 2]}


def randomized(make: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """A module with random parameters: zeros and ones of an initialization could hide errors."""
    rng = np.random.default_rng(0)

    def fill(param):
        values = rng.standard_normal(param.shape) * param.size**-0.5 * param.shape[-1] ** 0.5
        values = values if param.ndim > 1 else 0.5 + 0.3 * values
        return jnp.asarray(values.astype(np.float32))

    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(fill, state))


# Arrays are numpy's where a jitted function takes them: jax compiles each of its own operations.
def noise(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def build():
    """Layers by name, with jitted steps; the tests share the compiled functions."""
    built = {}

    def get(name: str):
        if name not in built:
            make, channels, block = LAYERS[name]
            layer = randomized(make)
            built[name] = layer, jax.jit(layer.step), channels, block
        return built[name]

    return get


def shapes(state):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)


def assert_near(got, want, atol=2e-5):
    want = np.asarray(want)
    scale = max(1.0, np.abs(want).max(initial=0.0))
    np.testing.assert_allclose(np.asarray(got) / scale, want / scale, atol=atol)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", LAYERS)
def test_steps_equal_one_call(build, name, steps):
    layer, step, channels, block = build(name)
    x = noise(2, NUM_BLOCKS * block, channels)
    whole, _ = step(x, layer.init_state(2))
    state, start, outputs = layer.init_state(2), 0, []
    for blocks in STEPS[steps]:
        before = shapes(state)
        y, state = step(x[:, start : start + blocks * block], state)
        assert shapes(state) == before
        outputs.append(y)
        start += blocks * block
    assert_near(np.concatenate(outputs, axis=1), whole)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_causal(build, name):
    layer, step, channels, block = build(name)
    x = noise(2, NUM_BLOCKS * block, channels)
    seen = 7 * block
    garbage = x.copy()
    garbage[:, seen:] = 1000 * noise(*x[:, seen:].shape, seed=2)
    y, z = (np.asarray(step(each, layer.init_state(2))[0]) for each in (x, garbage))
    known = y.shape[1] * 7 // NUM_BLOCKS
    np.testing.assert_array_equal(y[:, :known], z[:, :known])
    assert not np.array_equal(y[:, known:], z[:, known:])


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_a_batch_are_independent_and_may_differ_in_age(build, name):
    layer, step, channels, block = build(name)
    first, second, third = np.split(noise(1, 9 * block, channels), 3, axis=1)
    new = layer.init_state(1)
    _, old = step(first, new)
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), old, new)
    both, _ = step(np.concatenate([second, third]), joined)
    y, z = np.asarray(both)
    assert_near(y[None], step(second, old)[0])
    assert_near(z[None], step(third, new)[0])


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"), [(7, 1, 1), (3, 1, 4), (8, 4, 1), (10, 5, 1), (1, 1, 1)]
)
def test_conv_equals_its_definition(kernel_size, stride, dilation):
    layer = randomized(
        lambda rngs: Conv1d(3, 5, kernel_size, stride=stride, dilation=dilation, rngs=rngs)
    )
    x = noise(2, 20, 3)
    past = (kernel_size - 1) * dilation + 1 - stride
    padded = np.concatenate([np.zeros((2, past, 3)), x], axis=1)
    weight, bias = np.asarray(layer.weight[...]), np.asarray(layer.bias[...])
    want = np.stack(
        [
            bias + sum(padded[:, t + k * dilation] @ weight[k] for k in range(kernel_size))
            for t in range(0, 20, stride)
        ],
        axis=1,
    )
    assert_near(layer(jnp.asarray(x)), want, 1e-6)


def test_replicate_conv_pads_with_the_first_input():
    layer = randomized(lambda rngs: ReplicateConv1d(3, 5, 4, stride=2, use_bias=False, rngs=rngs))
    x = noise(1, 6, 3)
    padded = np.concatenate([x[:, :1], x[:, :1], x], axis=1)
    weight = np.asarray(layer.weight[...])
    want = [sum(padded[:, t + k] @ weight[k] for k in range(4)) for t in range(0, 6, 2)]
    assert_near(layer(jnp.asarray(x)), np.stack(want, axis=1), 1e-6)


@pytest.mark.parametrize(("kernel_size", "stride"), [(8, 4), (10, 5), (6, 2), (4, 4)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_transposed_conv_equals_scattering(kernel_size, stride, depthwise):
    channels = (3, 3) if depthwise else (3, 5)
    layer = randomized(
        lambda rngs: ConvTranspose1d(
            *channels, kernel_size, stride=stride, depthwise=depthwise, rngs=rngs
        )
    )
    x = noise(2, 7, 3)
    # Every input adds its kernel, torch's [in, out, K], to the output from its position on.
    (kernel,) = tables.conv_transpose(stride).inverse(np.asarray(layer.weight[...]))
    if depthwise:
        kernel = np.eye(3)[:, :, None] * kernel
    want = np.zeros((2, 7 * stride + kernel_size, channels[1]))
    for t in range(7):
        want[:, t * stride : t * stride + kernel_size] += np.einsum("bi,iok->bko", x[:, t], kernel)
    want = want[:, : 7 * stride] + np.asarray(layer.bias[...])
    assert_near(layer(jnp.asarray(x)), want, 1e-6)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="9 inputs is not a multiple of the stride 2"):
        Conv1d(3, 5, 4, stride=2, rngs=nnx.Rngs(0))(jnp.asarray(noise(1, 9, 3)))
    with pytest.raises(ValueError, match="7 is not a multiple of the stride 2"):
        ConvTranspose1d(3, 5, 7, stride=2, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError):
        StreamingLayer()(noise(1, 2, 3))


def test_attention_covers_exactly_its_window():
    layer = jax.jit(randomized(lambda rngs: TransformerLayer(CONFIG, rngs=rngs)))
    window, length = CONFIG.attention_window, 2 * CONFIG.attention_window
    x = noise(1, length, DIM)
    other = x.copy()
    other[:, 3] = noise(DIM, seed=2)
    differs = np.any(np.asarray(layer(other)) != np.asarray(layer(x)), axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(3, 3 + window))


def test_nearest_equals_brute_force():
    x, codebook = noise(2, 9, 6), noise(17, 6, seed=2)
    distances = np.linalg.norm(x[:, :, None] - codebook, axis=-1)
    ids = nearest(jnp.asarray(x), jnp.asarray(codebook))
    np.testing.assert_array_equal(ids, distances.argmin(axis=-1))


def test_residual_quantizer_equals_brute_force():
    quantizer = randomized(lambda rngs: ResidualQuantizer(CONFIG, 4, rngs=rngs))
    latent = jnp.asarray(noise(2, 9, DIM))
    residual = np.asarray(quantizer.in_proj(latent))
    total, want = np.zeros_like(residual), []
    for codebook in (np.asarray(c[...]) for c in quantizer.codebooks):
        distances = np.square(residual[:, :, None] - codebook).sum(axis=-1)
        want.append(distances.argmin(axis=-1))
        residual, total = residual - codebook[want[-1]], total + codebook[want[-1]]
    codes = quantizer.encode(latent, 4)
    np.testing.assert_array_equal(codes, np.stack(want, axis=-1))
    assert_near(quantizer.decode(codes), quantizer.out_proj(jnp.asarray(total)), 1e-6)


@pytest.mark.parametrize("num_semantic", [1, 2])
def test_both_groups_quantize_the_same_latent_and_are_added(num_semantic):
    config = dataclasses.replace(CONFIG, num_semantic_codebooks=num_semantic)
    quantizer = randomized(lambda rngs: SplitQuantizer(config, rngs=rngs))
    latent = jnp.asarray(noise(2, 9, DIM))
    codes = quantizer.encode(latent, 7)
    semantic = quantizer.semantic.encode(latent, num_semantic)
    acoustic = quantizer.acoustic.encode(latent, 7 - num_semantic)
    np.testing.assert_array_equal(codes, jnp.concatenate([semantic, acoustic], axis=-1))
    for count in range(1, 8):
        few = codes[..., :count]
        np.testing.assert_array_equal(quantizer.encode(latent, count), few)
        want = quantizer.semantic.decode(few[..., :num_semantic])
        if count > num_semantic:
            want = want + quantizer.acoustic.decode(few[..., num_semantic:])
        assert_near(quantizer.decode(few), want, 1e-6)


@pytest.fixture(scope="module")
def params():
    return nnx.to_pure_dict(nnx.state(randomized(lambda rngs: Mimi(CONFIG, rngs=rngs))))


@pytest.fixture(scope="module")
def tiny_codec(params):
    return Codec(CONFIG, params)


def speech(num_samples: int, seed: int = 0) -> np.ndarray:
    return 0.2 * noise(num_samples, seed=seed)


def random_codes(num_frames: int, count: int = 7, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, CONFIG.codebook_size, (num_frames, count))


def test_codec_pads_the_audio_and_calls_the_network(tiny_codec, params):
    mimi = codec.bind(CONFIG, params)
    audio = speech(20 * FRAME + 1)
    codes = tiny_codec.encode(audio)
    padded = jnp.asarray(np.pad(audio, (0, FRAME - 1)))[None]
    assert codes.dtype == np.int32
    encode = jax.jit(mimi.encode, static_argnums=1)
    np.testing.assert_array_equal(codes, encode(padded[..., None], 7)[0])
    decoded = tiny_codec.decode(codes)
    assert decoded.dtype == np.float32
    assert decoded.shape == (21 * FRAME,)
    assert_near(decoded, jax.jit(mimi.decode)(jnp.asarray(codes)[None])[0, :, 0])


def test_long_recordings_are_encoded_and_decoded_in_blocks(tiny_codec, monkeypatch):
    audio = speech(22 * FRAME)
    codes = tiny_codec.encode(audio)
    whole = tiny_codec.decode(codes)
    monkeypatch.setattr(codec, "MAX_BLOCK_FRAMES", 8)
    np.testing.assert_array_equal(tiny_codec.encode(audio), codes)
    assert_near(tiny_codec.decode(codes), whole)


@pytest.mark.parametrize("num_frames", [0, 1, 3, 8, 127, 128, 129, 400])
def test_blocks_cover_all_frames_with_few_sizes(num_frames):
    blocks = list(codec._blocks(num_frames))
    ends = [start + size for start, size in blocks]
    assert [start for start, _ in blocks] == [0, *ends][: len(blocks)]
    assert [size for _, size in blocks][:-1] == [128] * (len(blocks) - 1)
    assert all(size in (1, 2, 4, 8, 16, 32, 64, 128) for _, size in blocks)
    assert num_frames <= max(ends, default=0) < max(2 * num_frames, 1)


def test_ragged_batches_equal_single_recordings(tiny_codec):
    audio = [speech(n, seed=n) for n in (5 * FRAME, 7 * FRAME + 1, 0, 6 * FRAME)]
    codes = tiny_codec.encode(audio)
    assert [row.shape for row in codes] == [(5, 7), (8, 7), (0, 7), (6, 7)]
    for row, alone in zip(codes, audio, strict=True):
        np.testing.assert_array_equal(row, tiny_codec.encode(alone))
    decoded = tiny_codec.decode(codes)
    assert [row.shape for row in decoded] == [(n * FRAME,) for n in (5, 8, 0, 6)]
    for row, alone in zip(decoded, codes, strict=True):
        assert_near(row, tiny_codec.decode(alone))


def test_empty_input_gives_empty_output(tiny_codec):
    assert tiny_codec.encode(np.zeros(0, np.float32)).shape == (0, 7)
    assert tiny_codec.decode(np.zeros((0, 7), np.int32)).shape == (0,)
    assert tiny_codec.encode([]) == []
    assert tiny_codec.decode([]) == []


def test_encoding_fewer_codebooks_gives_the_first_ones(tiny_codec):
    audio = speech(8 * FRAME)
    codes = tiny_codec.encode(audio)
    np.testing.assert_array_equal(tiny_codec.encode(audio, num_codebooks=3), codes[:, :3])
    outputs = [tiny_codec.decode(codes[:, :count]) for count in (1, 3, 7)]
    assert len({output.tobytes() for output in outputs}) == 3


def test_streams_equal_whole_recordings(tiny_codec):
    audio, codes = speech(32 * FRAME), random_codes(32)[None].astype(np.int32)
    state = tiny_codec.decode_stream_state()
    pieces = []
    for start in range(0, 32, 8):
        samples, state = tiny_codec.decode_frames(codes[:, start : start + 8], state)
        pieces.append(samples)
    assert_near(np.concatenate(pieces, axis=1)[0], tiny_codec.decode(codes[0]))
    state = tiny_codec.encode_stream_state()
    pieces = []
    for block in np.split(audio[None], 4, axis=1):
        block, state = tiny_codec.encode_samples(block, state, 7)
        pieces.append(block)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[0], tiny_codec.encode(audio))


def test_wrong_input_is_an_error_that_names_it(tiny_codec):
    codes = random_codes(4)
    codes[2, 5] = 32
    with pytest.raises(InputError, match=r"code 32 is outside 0\.\.31"):
        tiny_codec.decode(codes)
    with pytest.raises(InputError, match=r"code -1 is outside 0\.\.31"):
        tiny_codec.decode(np.full((2, 7), -1))
    with pytest.raises(InputError, match=r"8 codebooks asked for; the codec has 1\.\.7"):
        tiny_codec.decode(random_codes(4, 8))
    with pytest.raises(InputError, match="0 codebooks asked for"):
        tiny_codec.encode(speech(100), num_codebooks=0)
    with pytest.raises(InputError, match=r"shape \(2, 100\); mono audio is \[num_samples\]"):
        tiny_codec.encode(np.zeros((2, 100), np.float32))
    with pytest.raises(InputError, match="codes are float32"):
        tiny_codec.decode(np.zeros((2, 7), np.float32))
    with pytest.raises(InputError, match=r"\[3, 7\] codebooks"):
        tiny_codec.decode([random_codes(2), random_codes(2, 3)])
    with pytest.raises(CheckpointError, match="2 channels"):
        Codec(dataclasses.replace(CONFIG, channels=2), {})


def test_random_weights_give_noise_at_the_level_of_speech():
    fresh = Codec(CONFIG, nnx.to_pure_dict(nnx.state(Mimi(CONFIG, rngs=nnx.Rngs(0)))))
    audio = fresh.decode(random_codes(21))
    assert 0.02 < audio.std() < 0.5
    assert len(np.unique(fresh.encode(speech(21 * FRAME)), axis=0)) > 10
    assert (fresh.sample_rate, fresh.frame_size, fresh.num_codebooks) == (24_000, 1920, 7)


def test_parameters_of_other_types_become_float32(params):
    halved = jax.tree.map(lambda p: np.asarray(p).astype(jnp.bfloat16), params)
    assert Codec(CONFIG, halved).decode(random_codes(21)).dtype == np.float32


class Tensors(dict):
    """A checkpoint in memory."""

    name = "memory"

    @property
    def shapes(self):
        return {key: jax.ShapeDtypeStruct(t.shape, t.dtype) for key, t in self.items()}

    def read(self, key):
        return self[key]


def flat(params):
    return {"/".join(map(str, path)): np.asarray(p) for path, p in flatten_dict(params).items()}


def written(table, params) -> Tensors:
    own = flat(params)
    return Tensors((name, np.asarray(make())) for name, make in invert(table, own, own.__getitem__))


# Names that moshi saves where the published file has others, and names of older files.
RESPELT = {
    "published": {},
    "moshi": {"in_proj_weight": "in_projs.0.weight", "out_proj.weight": "out_projs.0.weight"},
    "older": {
        "embedding_sum": "embed_sum",
        "cluster_usage": "cluster_size",
        "_initialized": "inited",
    },
}


@pytest.mark.parametrize("spelling", RESPELT)
def test_the_kyutai_table_reads_every_naming(params, spelling):
    tensors = written(tables.kyutai_table(CONFIG), params)
    for old, new in RESPELT[spelling].items():
        tensors = Tensors((name.replace(old, new), t) for name, t in tensors.items())
    table = tables.kyutai_table(CONFIG, tensors.keys())
    got = dict(convert(table, tensors, Tensors(flat(params)).shapes))
    jax.tree.map(np.testing.assert_array_equal, got, flat(params))


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_huggingface_table_works_in_both_directions(blocks):
    config = dataclasses.replace(CONFIG, num_residual_layers=blocks, ratios=(3, 2))
    params = nnx.to_pure_dict(nnx.state(randomized(lambda rngs: Mimi(config, rngs=rngs))))
    table = tables.huggingface_table(config).prefixed("codec_model.", "codec/")
    tensors = written(table, {"codec": params})
    got = dict(convert(table, tensors, Tensors(flat({"codec": params})).shapes))
    jax.tree.map(np.testing.assert_array_equal, got, flat({"codec": params}))


def test_a_codebook_is_a_mean_and_unused_entries_stay_finite():
    total, usage = np.ones((3, 2), np.float32), np.array([2.0, 0.0, 0.5], np.float32)
    (codebook,) = tables.CODEBOOK.forward(total, usage, np.ones(1, np.float32))
    np.testing.assert_allclose(codebook[:, 0], [0.5, 1e5, 2.0], rtol=1e-6)
