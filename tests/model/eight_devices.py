"""A model on meshes of up to eight devices; `test_sharding.py` runs it with eight CPU devices.

XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/model/eight_devices.py
"""

import functools
import math

import jax
import numpy as np
import pytest

import csm_jax
from csm_jax.checkpoints.native_format import flatten
from csm_jax.config import tiny
from csm_jax.errors import InputError
from csm_jax.inference.decode_batch import DecodeBatch, Rewind, Utterance
from csm_jax.model.sampling import Sampling
from csm_jax.model.sharding import make_mesh, param_sharding, state_sharding
from csm_jax.prompt.turns import Prompt

CONFIG = tiny()
NUM_CODEBOOKS = CONFIG.num_codebooks
MESHES = [(8, 1), (1, 2), (2, 2), (4, 2)]

pytestmark = pytest.mark.filterwarnings("error:Some donated buffers were not usable")

compiled: list[str] = []


def note_compilation(event: str, duration: float, **details) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(str(details.get("fun_name")))


jax.monitoring.register_event_duration_secs_listener(note_compilation)


def utterance(index: int) -> Utterance:
    """A prompt of text, or of text and audio; greedy and sampled in turn."""
    rng = np.random.default_rng(index)
    length = 12 + 2 * index  # all are padded to 32
    is_audio = (np.arange(length) > length // 3) & (np.arange(length) < length - 2)
    mask = is_audio[:, None] == (np.arange(NUM_CODEBOOKS + 1) < NUM_CODEBOOKS)
    frames = np.where(mask, rng.integers(0, 35, mask.shape), 0).astype(np.int32)
    prompt = Prompt(frames, mask)
    return Utterance(prompt, Sampling(greedy=index % 2 == 0), seed=index, max_frames=60)


@functools.cache
def model(dtype: str, quantize: str, shape: tuple[int, int] | None = None) -> csm_jax.Generator:
    return csm_jax.load("random:tiny", dtype, quantize, mesh=shape and make_mesh(*shape))


def new_batch(model: csm_jax.Generator, size: int, max_seq_len: int = 128) -> DecodeBatch:
    return DecodeBatch(CONFIG, model.params, size, max_seq_len, model.mesh)


def run_requests(batch: DecodeBatch) -> np.ndarray:
    """Codes [B, n, Q] of requests that join, are rewound, leave and are replaced."""
    for index in range(8):
        batch.join(index, utterance(index))
    chunks = [batch.run(9).codes, batch.run(4).codes]
    batch.rewind(3, Rewind(chunks[0][3, :5], seed=99))
    chunks.append(batch.run(6, pause=True).codes)
    batch.leave(6)
    chunks.append(batch.run(3).codes)
    batch.join(6, utterance(1))
    chunks.append(batch.run(9).codes)
    return np.concatenate(chunks, axis=1)


@functools.cache
def codes_of_one_device(dtype: str, quantize: str) -> np.ndarray:
    return run_requests(new_batch(model(dtype, quantize), 8))


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8


def assert_in_place(batch: DecodeBatch, shape: tuple[int, int]) -> None:
    """Checks that the state, random keys included, is sharded as the mesh allows."""
    places = state_sharding(batch._state, make_mesh(*shape))
    for leaf, place in zip(*map(jax.tree.leaves, (batch._state, places)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    (data, axis), heads = shape, CONFIG.backbone.num_kv_heads
    held = 8 // data, heads if heads % axis else heads // axis
    key = batch._state.cache.layers[0].key
    assert {shard.data.shape[:2] for shard in key.addressable_shards} == {held}


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_codes_equal_one_device_and_nothing_is_compiled_twice(shape):
    batch = new_batch(model("float32", "none", shape), 8)
    assert_in_place(batch, shape)
    compiled.clear()
    codes = run_requests(batch)
    assert sorted(set(compiled) - {"jit(set_row)"}) == ["jit(prefill)", "jit(run_frames)"]
    assert len(set(compiled)) == len(compiled)
    assert_in_place(batch, shape)
    want = codes_of_one_device("float32", "none")
    assert len(np.unique(want)) > 20
    np.testing.assert_array_equal(codes, want)


def test_codes_in_int8_equal_one_device():
    """Sums in another order differ by 1e-7, which sometimes rounds an activation to the next whole
    number: the codes of a row may then differ, as they may in another batch."""
    codes = run_requests(new_batch(model("float32", "int8", (4, 2)), 8))
    want = codes_of_one_device("float32", "int8")
    np.testing.assert_array_equal(codes[:, :4], want[:, :4])
    assert np.all(codes == want, axis=(1, 2)).sum() >= 5


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_parameters_are_split_between_devices(quantize):
    sharded = model("float32", quantize, (4, 2))
    held = {path: leaf.addressable_shards for path, leaf in flatten(sharded.params).items()}
    layer = "backbone/layers/0"
    rows, mlp = 8 * (6 + 2 * 2) // 2, CONFIG.backbone.mlp_dim // 2
    wanted = {
        f"{layer}/attn/qkv/weight": (rows, 48),
        f"{layer}/attn/o/weight": (48, 24),
        f"{layer}/mlp/gate/weight": (mlp, 48),
        f"{layer}/mlp/up/weight": (mlp, 48),
        f"{layer}/mlp/down/weight": (48, mlp),
        f"{layer}/attn_norm/scale": (48,),
        "text_embedding": (263, 48),
    }
    if quantize == "int8":
        wanted |= {f"{layer}/attn/qkv/weight_scale": (rows,), f"{layer}/attn/o/weight_scale": (48,)}
    for path, shape in wanted.items():
        assert [shard.data.shape for shard in held[path]] == [shape] * 8, path


def bytes_by_device(model: csm_jax.Generator) -> dict[jax.Device, int]:
    shards = [s for leaf in jax.tree.leaves(model.params) for s in leaf.addressable_shards]
    devices = {shard.device for shard in shards}
    return {d: sum(s.data.nbytes for s in shards if s.device == d) for d in devices}


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_bytes_per_device_fall_with_the_number_of_devices(quantize):
    one, two = (bytes_by_device(model("float32", quantize, shape)) for shape in [(1, 1), (4, 2)])
    assert (len(one), len(two)) == (1, 8)
    shapes = flatten(model("float32", quantize).params)
    split = sum(
        leaf.nbytes
        for path, leaf in shapes.items()
        if "model" in param_sharding(f"csm/{path}", leaf.shape, CONFIG, make_mesh(4, 2)).spec
    )
    (whole,) = one.values()
    assert 0.2 * whole < split
    assert set(two.values()) == {whole - split // 2}


@pytest.mark.parametrize("source", ["native", "huggingface"])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_checkpoints_of_all_layouts_load_onto_a_mesh(request, source, quantize):
    directory, mesh = request.getfixturevalue(source), make_mesh(2, 2)
    plain, sharded = (csm_jax.load(directory, quantize=quantize, mesh=m) for m in (None, mesh))
    got, want = flatten(sharded.params), flatten(plain.params)
    assert got.keys() == want.keys()
    for path, leaf in got.items():
        place = param_sharding(f"csm/{path}", leaf.shape, CONFIG, mesh)
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want[path]), path)


def test_a_single_request_runs_on_a_mesh():
    """Its one row cannot be divided over the data axis."""
    arguments = dict(max_audio_length_ms=1200, seed=3, guard="off")
    one, many = (model("float32", "none", shape) for shape in (None, (2, 4)))
    want = one.generate("Hello there.", **arguments)
    np.testing.assert_allclose(many.generate("Hello there.", **arguments), want, atol=1e-5)


def test_the_codec_is_compiled_once_for_all_frames():
    codec = model("float32", "none", (2, 2)).codec
    state, codes = codec.decode_stream_state(3), np.zeros((3, 1, NUM_CODEBOOKS), np.int32)
    compiled.clear()
    for _ in range(3):
        _, state = codec.decode_frames(codes, state)
    assert compiled == ["jit(_decode_step)"]


def test_a_batch_size_that_the_mesh_does_not_divide_is_an_error():
    with pytest.raises(InputError, match="3 rows cannot be divided by the mesh's data axis of 2"):
        new_batch(model("float32", "none", (2, 2)), 3)


def test_a_mesh_of_more_devices_than_exist_is_an_error():
    with pytest.raises(InputError, match="of which there are 8"):
        make_mesh(3, 3)
    assert math.prod(make_mesh(2, 3).devices.shape) == 6
