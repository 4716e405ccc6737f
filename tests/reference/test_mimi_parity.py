"""The codec against kyutai's and Hugging Face's, which write the files that it loads.

The tests use the full size with random weights; they take about 1.5 GB and a minute.
"""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from csm_jax.config import MimiConfig
from csm_jax.convert import mimi as tables
from csm_jax.convert.configs import mimi_from_huggingface
from csm_jax.convert.rules import convert
from csm_jax.convert.sources import SafetensorsSource
from csm_jax.mimi import Codec, Mimi

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
loaders = pytest.importorskip("moshi.models.loaders")
save_file = pytest.importorskip("safetensors.torch").save_file

FRAME = 1920
# Relative to the loudest sample. Both sides compute in float32, in different orders.
TOLERANCE = 1e-4


def speech(num_samples: int) -> np.ndarray:
    """Chirps and noise that swell and fade like syllables, at the level of speech."""
    t = np.arange(num_samples) / 24_000
    rng = np.random.default_rng(0)
    chirps = sum(np.sin(2 * np.pi * (f + 15 * k * t) * t) / k for k, f in enumerate((110, 370), 1))
    syllables = np.sin(2 * np.pi * 2.3 * t) ** 2
    return (syllables * (0.1 * chirps + 0.05 * rng.standard_normal(num_samples))).astype("float32")


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Draws weights that keep the size of the activations and give every part an effect.

    The packages start with layer scales of 0.01 and empty codebooks; here the scales are about
    0.3, and the entries have lengths like their residuals. One entry is unused.
    """
    # torch.cdist, which both packages use, rounds squared distances by about 1e-7 of the
    # residual's: closer ties are decided by rounding. With this seed none of the 6000 decisions for
    # 15 s is closer than 1e-6.
    generator = torch.Generator().manual_seed(1)

    def normal(tensor, scale, mean=0.0):
        tensor.copy_(mean + scale * torch.randn(tensor.shape, generator=generator))

    transposed = {
        name for name, m in model.named_modules() if isinstance(m, torch.nn.ConvTranspose1d)
    }
    for name, param in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if kind == "scale":
            normal(param, 0.1, 0.3)
        elif kind == "bias":
            normal(param, 0.01)
        elif param.ndim == 1:
            normal(param, 0.2, 1.0)
        else:
            # Each output of a transposed convolution of two strides sums two taps per input.
            inputs = 2 * param.shape[0] if owner in transposed else param[0].numel()
            normal(param, (1.0 / inputs) ** 0.5)
    for name, usage in model.named_buffers():
        if not name.endswith("cluster_usage"):
            continue
        codebook = model.get_submodule(name.rpartition(".")[0])
        total = getattr(codebook, "embed_sum", getattr(codebook, "embedding_sum", None))
        usage.copy_(10 * torch.rand(usage.shape, generator=generator))
        usage[0] = 0.0
        normal(total, 0.25)
        total.mul_(usage[:, None])


def load(table, config: MimiConfig, file) -> Codec:
    abstract = nnx.eval_shape(lambda: Mimi(config, rngs=nnx.Rngs(0)))
    params = flatten_dict(nnx.to_pure_dict(nnx.state(abstract)))
    paths = {"/".join(map(str, path)): path for path in params}
    shapes = {name: params[path] for name, path in paths.items()}
    tensors = convert(table, SafetensorsSource([file]), shapes)
    return Codec(config, unflatten_dict({paths[name]: tensor for name, tensor in tensors}))


@pytest.fixture(scope="session")
def kyutai(tmp_path_factory):
    """moshi's model, and ours loaded from its file, which has the published names."""
    model = loaders.get_mimi(None, num_codebooks=32)
    randomize(model)
    names = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}
    tensors = model.state_dict()
    for saved, published in names.items():
        tensors = {name.replace(saved, published): tensor for name, tensor in tensors.items()}
    file = tmp_path_factory.mktemp("kyutai") / "tokenizer.safetensors"
    save_file(tensors, file)
    assert len(tensors) == 318
    yield model, load(tables.kyutai_table(MimiConfig()), MimiConfig(), file)
    file.unlink()


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory):
    """transformers' model, and ours loaded from the files of `save_pretrained`."""
    model = transformers.MimiModel(transformers.MimiConfig()).eval()
    randomize(model)
    directory = tmp_path_factory.mktemp("huggingface")
    yield model, load_huggingface(model, directory)
    (directory / "model.safetensors").unlink()


def load_huggingface(model, directory) -> Codec:
    model.save_pretrained(directory)
    config = mimi_from_huggingface(model.config.to_dict())
    return load(tables.huggingface_table(config), config, directory / "model.safetensors")


@torch.no_grad()
def encode_kyutai(model, audio: np.ndarray, num_codebooks: int = 32) -> np.ndarray:
    model.set_num_codebooks(num_codebooks)
    return model.encode(torch.from_numpy(audio)[None, None])[0].T.numpy()


@torch.no_grad()
def decode_kyutai(model, codes: np.ndarray) -> np.ndarray:
    return model.decode(as_torch(codes))[0, 0].numpy()


@torch.no_grad()
def encode_huggingface(model, audio: np.ndarray, num_codebooks: int | None = None) -> np.ndarray:
    audio = torch.from_numpy(audio)[None, None]
    return model.encode(audio, num_quantizers=num_codebooks).audio_codes[0].T.numpy()


@torch.no_grad()
def decode_huggingface(model, codes: np.ndarray) -> np.ndarray:
    return model.decode(as_torch(codes)).audio_values[0, 0].numpy()


def as_torch(codes: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(codes.T[None]).astype(np.int64))


def random_codes(num_frames: int, num_codebooks: int, size: int = 2048) -> np.ndarray:
    return np.random.default_rng(1).integers(0, size, (num_frames, num_codebooks))


def assert_sounds_like(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


# 12.8 s are 320 positions of the transformers, more than the 250 of their window, in two blocks.
@pytest.mark.parametrize("num_samples", [160 * FRAME, 2 * 24_000 + 1, 100])
def test_codes_equal_kyutais(kyutai, num_samples):
    model, codec = kyutai
    audio = speech(num_samples)
    want = encode_kyutai(model, audio)
    np.testing.assert_array_equal(codec.encode(audio), want)
    if num_samples > 24_000:
        assert len(np.unique(want, axis=0)) > len(want) // 2, "the comparison should not be easy"


# Hugging Face's model pads every layer separately, so the last frame differs if a recording is not
# a whole number of frames: only the frames before it are compared.
@pytest.mark.parametrize("num_samples", [160 * FRAME, 2 * 24_000 + 1])
def test_codes_equal_huggingfaces(huggingface, num_samples):
    model, codec = huggingface
    audio = speech(num_samples)
    whole = num_samples // FRAME
    np.testing.assert_array_equal(
        codec.encode(audio)[:whole], encode_huggingface(model, audio)[:whole]
    )


@pytest.mark.parametrize("num_frames", [160, 20, 1])
def test_audio_equals_kyutais(kyutai, num_frames):
    model, codec = kyutai
    codes = random_codes(num_frames, 32)
    assert_sounds_like(codec.decode(codes), decode_kyutai(model, codes))


@pytest.mark.parametrize("num_frames", [160, 1])
def test_audio_equals_huggingfaces(huggingface, num_frames):
    model, codec = huggingface
    codes = random_codes(num_frames, 32)
    assert_sounds_like(codec.decode(codes), decode_huggingface(model, codes))


def test_the_first_eight_codebooks_equal_both_packages(kyutai, huggingface):
    audio, codes = speech(20 * FRAME), random_codes(20, 8)
    model, codec = kyutai
    np.testing.assert_array_equal(codec.encode(audio, 8), encode_kyutai(model, audio, 8))
    assert_sounds_like(codec.decode(codes), decode_kyutai(model, codes))
    model, codec = huggingface
    np.testing.assert_array_equal(codec.encode(audio, 8), encode_huggingface(model, audio, 8))
    assert_sounds_like(codec.decode(codes), decode_huggingface(model, codes))


def test_streams_equal_kyutais(kyutai):
    """Compares under 250 positions: beyond, moshi's ring buffer loses a key that a query needs."""
    model, codec = kyutai
    model.set_num_codebooks(32)
    audio, codes = speech(10 * FRAME), random_codes(10, 32)
    encode_state, decode_state = codec.encode_stream_state(), codec.decode_stream_state()
    with torch.no_grad(), model.streaming(1):
        for i in range(10):
            block = audio[None, i * FRAME : (i + 1) * FRAME]
            want = model.encode(torch.from_numpy(block)[None])[0].T.numpy()
            got, encode_state = codec.encode_samples(block, encode_state, 32)
            np.testing.assert_array_equal(got[0], want)
            frame = codes[i : i + 1]
            want = model.decode(as_torch(frame))[0, 0].numpy()
            got, decode_state = codec.decode_frames(frame[None].astype(np.int32), decode_state)
            assert_sounds_like(np.asarray(got[0]), want)


# All sizes differ, so that mixing up two of them fails.
ODD = dict(
    num_filters=6,
    num_residual_layers=2,
    dilation_growth_rate=3,
    upsampling_ratios=[5, 3, 2],
    kernel_size=5,
    last_kernel_size=4,
    residual_kernel_size=4,
    compress=3,
    hidden_size=24,
    upsample_groups=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=20,
    sliding_window=9,
    norm_eps=1e-3,
    codebook_size=64,
    codebook_dim=10,
    vector_quantization_hidden_dimension=10,
    num_quantizers=6,
    num_semantic_quantizers=2,
    sampling_rate=6000,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)


@pytest.mark.parametrize(
    "changes", [{}, {"num_residual_layers": 1, "upsampling_ratios": [3, 4], "compress": 2}]
)
def test_odd_sizes_equal_huggingfaces(tmp_path, changes):
    model = transformers.MimiModel(transformers.MimiConfig(**(ODD | changes))).eval()
    randomize(model)
    codec = load_huggingface(model, tmp_path)
    audio = speech(41 * codec.frame_size)
    codes = random_codes(41, 6, 64)
    np.testing.assert_array_equal(codec.encode(audio), encode_huggingface(model, audio))
    assert_sounds_like(codec.decode(codes), decode_huggingface(model, codes))


def test_every_field_of_the_config_is_read():
    config = mimi_from_huggingface(transformers.MimiConfig(**ODD).to_dict())
    assert dataclasses.replace(config, ratios=(4, 5, 6, 8)) != MimiConfig()
    assert mimi_from_huggingface(transformers.MimiConfig().to_dict()) == MimiConfig()
