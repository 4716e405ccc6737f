"""The fused kernels against the plain path. Pallas interprets them here, on any device.

`tests/test_gpu.py` compiles them for a GPU.
"""

import dataclasses
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from measure_card import logits_of

import csm_jax
from csm_jax.checkpoints.random_weights import random_params
from csm_jax.config import CSMConfig, tiny
from csm_jax.errors import InputError
from csm_jax.inference.decode_step import frame_step, init_state
from csm_jax.inference.row_interventions import NO_INTERVENTIONS
from csm_jax.model import layers
from csm_jax.model.changes import StackChanges
from csm_jax.model.kernels import attention, fused, launch
from csm_jax.model.kernels.choice import KERNELS, PALLAS, XLA, bind_to_kernels, choose
from csm_jax.model.kernels.draw import sample
from csm_jax.model.precision import Precision
from csm_jax.model.sampling import Sampling, SamplingParams
from csm_jax.model.sampling import sample as sample_plainly

BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
# Neither a power of two nor a multiple of a block, and long enough for the form of long caches.
CAPACITY = 77
CASES = [(1, 1), (0, 3), (1, 3), (0, 8), (1, 8)]
SAMPLINGS = [Sampling(greedy=True), Sampling(), Sampling(top_k=9, top_p=0.8, min_p=0.01)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", True)
    # Each kernel takes a while to compile.
    monkeypatch.setattr(fused.FusedCSM, "depth_unroll", 1)
    # As a GPU multiplies int8 weights; a CPU rounds the activations to int8 too.
    monkeypatch.setattr(layers, "_by_quantized_rows", layers._by_widened_weights)


def with_layers(config: CSMConfig, backbone: int, depth_decoder: int) -> CSMConfig:
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, num_layers=backbone),
        depth_decoder=dataclasses.replace(config.depth_decoder, num_layers=depth_decoder),
    )


def codes_of(config, params, kernels, rows, dtype, interventions=NO_INTERVENTIONS):
    """Three frames [F, B, Q], after positions whose keys and values are random."""
    state = init_state(config=config, batch=len(rows), max_seq_len=CAPACITY, dtype=dtype)
    keys = iter(jax.random.split(jax.random.key(7), 99))
    filled = jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape, x.dtype), state.cache.layers
    )
    lengths = jnp.asarray([CAPACITY - 9, 1, 30, 64, 63, 2, 17, 50][: len(rows)], jnp.int32)
    state = state._replace(
        cache=state.cache._replace(layers=filled, lengths=lengths),
        frame=jax.random.randint(next(keys), state.frame.shape, 0, config.audio_vocab_size),
        mask=jnp.ones_like(state.mask),
        done=jnp.zeros_like(state.done),
    )
    sampling = SamplingParams.stack(rows)

    @jax.jit
    def run(params, state):
        model = bind_to_kernels(config, params, kernels)

        def step(state, _):
            return frame_step(model, state, sampling, interventions=interventions)

        return jax.lax.scan(step, state, None, length=3)

    return np.asarray(run(params, state)[1].codes)[:, :, 0]


@pytest.mark.parametrize(
    ("int8", "batch"),
    [
        (True, 3),
        *(pytest.param(*case, marks=pytest.mark.long) for case in [(0, 1), (0, 8), (1, 8)]),
    ],
)
def test_codes_are_those_of_the_plain_path(int8, batch, monkeypatch):
    """Greedy and sampled; long caches are read in blocks."""
    monkeypatch.setattr(attention, "_MOST_PRODUCTS", 1 << 11)
    config = with_layers(tiny(), 1, 1)
    params = random_params(config, Precision(FLOAT32, FLOAT32, bool(int8)))["csm"]
    rows = [SAMPLINGS[index % len(SAMPLINGS)] for index in range(batch)]
    codes = codes_of(config, params, PALLAS, rows, FLOAT32)
    assert np.array_equal(codes, codes_of(config, params, XLA, rows, FLOAT32))
    assert len(np.unique(codes)) > 9


@pytest.mark.parametrize(
    ("int8", "batch"),
    [(0, 1), *(pytest.param(*case, marks=pytest.mark.long) for case in CASES)],
)
def test_logits_in_bfloat16_are_near_those_of_the_plain_path(int8, batch):
    """So near that greedy codes are the same, but for those that are about equally likely."""
    config = with_layers(tiny(), 1, 1) if not int8 and batch == 1 else tiny()
    plain, results = both_logits(config, bool(int8), batch)
    assert np.max(np.abs(results - plain)) < 0.15
    assert np.sqrt(np.mean(np.square(results - plain))) < 0.03
    largest = np.sort(plain, axis=-1)
    is_clear = largest[..., -1] - largest[..., -2] > 0.15
    same = np.argmax(results, axis=-1) == np.argmax(plain, axis=-1)
    assert np.all(same | ~is_clear)
    assert np.mean(is_clear) > 0.4


@pytest.mark.long
@pytest.mark.parametrize(("int8", "batch"), [(0, 1), (1, 3)])
def test_logits_of_the_full_width_are_near_those_of_the_plain_path(int8, batch):
    """One layer of each stack."""
    config = dataclasses.replace(csm_jax.csm_1b(), text_vocab_size=300, num_codebooks=4)
    plain, results = both_logits(with_layers(config, 1, 1), bool(int8), batch)
    assert np.max(np.abs(results - plain)) < 0.05
    assert np.sqrt(np.mean(np.square(results - plain))) < 0.01


def both_logits(config, int8, batch):
    """Logits of given codes in bfloat16, in XLA's kernels and in the fused ones; both spread by
    about 1."""
    params = random_params(config, Precision(BFLOAT16, BFLOAT16, int8))["csm"]
    shape = batch, config.num_codebooks
    codes = np.int32(np.random.default_rng(2).integers(0, config.codec.codebook_size, shape))
    plain, results = (logits_of(config, params, kernels, codes, 3) for kernels in KERNELS)
    assert np.std(plain) > 0.5
    return plain, results


def test_ids_are_drawn_as_by_the_plain_path():
    rows = [
        *SAMPLINGS,
        Sampling(top_k=5000, top_p=0.9, temperature=1.3),
        Sampling(min_p=0.1, top_k=5000),
        Sampling(top_k=1),
    ]
    random = np.random.default_rng(0)
    logits = jnp.asarray(3 * random.standard_normal((len(rows), 2051)), jnp.float32)
    numbers = jnp.asarray(random.random((9, len(rows))), jnp.float32)
    values = SamplingParams.stack(rows).backbone
    draw = jax.jit(sample)
    for index in range(len(numbers)):
        ids = draw(logits, numbers, jnp.asarray([index], jnp.int32), values)
        assert np.array_equal(ids, sample_plainly(logits, numbers[index], values))


def test_the_depth_decoder_runs_plainly_where_its_states_are_changed(caplog):
    config = with_layers(tiny(), 1, 1)
    params = random_params(config, Precision(FLOAT32, FLOAT32))["csm"]
    model = bind_to_kernels(config, params, PALLAS)
    plain = bind_to_kernels(config, params, XLA)
    inputs = jnp.ones((1, 2, config.depth_decoder.embed_dim))
    changes = StackChanges(added={1: jnp.ones((1, config.depth_decoder.embed_dim))})
    fused._tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        got = [model.depth_step(inputs, plain.depth_cache(1), changes)[0] for _ in range(2)]
    assert np.array_equal(got[0], plain.depth_step(inputs, plain.depth_cache(1), changes)[0])
    assert [record.message for record in caplog.records] == [
        "kernels=pallas: the depth decoder runs in XLA's kernels where its states are changed"
    ]


GPU = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
OLD = SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
AMD = SimpleNamespace(platform="gpu", device_kind="MI300X", compute_capability="gfx942")


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (GPU, BFLOAT16, None),
        (GPU, FLOAT32, "the model is computed in float32, and the kernels in bfloat16"),
        (CPU, BFLOAT16, "the device is cpu and no CUDA GPU"),
        (AMD, BFLOAT16, "the device is MI300X and no CUDA GPU"),
        (OLD, BFLOAT16, "the compute capability is 7.5, and below 8.0"),
    ],
)
def test_kernels_are_chosen_for_a_device_and_a_type(device, dtype, reason, monkeypatch, caplog):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with caplog.at_level(logging.WARNING):
        assert choose(PALLAS, Precision(dtype, dtype)) == (XLA if reason else PALLAS)
    messages = [record.message for record in caplog.records]
    assert messages == ([f"kernels=pallas: {reason}, so XLA's kernels are used"] if reason else [])
    assert choose(XLA, Precision(dtype, dtype)) == XLA


def test_several_devices_take_the_plain_path(caplog):
    mesh = SimpleNamespace(devices=np.asarray([GPU, GPU]), size=2)
    with caplog.at_level(logging.WARNING):
        assert choose(PALLAS, Precision(BFLOAT16, BFLOAT16), mesh) == XLA
    assert "the model is on 2 devices" in caplog.text


def test_unknown_kernels_are_refused():
    with pytest.raises(InputError, match="kernels is cuda, but must be xla or pallas"):
        csm_jax.load("random:tiny", kernels="cuda")


def test_a_model_on_a_cpu_loads_with_the_plain_path(caplog):
    assert csm_jax.load("random:tiny", kernels=PALLAS).kernels == XLA
    assert "kernels=pallas: the device is cpu and no CUDA GPU" in caplog.text
