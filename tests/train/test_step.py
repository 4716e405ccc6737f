"""The choice of frames for the depth decoder, and the training step."""

import dataclasses
import math

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_jax.errors import InputError
from csm_jax.model.lora import LoRAConfig, init_adapters
from csm_jax.model.precision import FLOAT32, Precision
from csm_jax.train.batches import Batch
from csm_jax.train.fsdp import AXES, check_batch_size, fsdp_sharding
from csm_jax.train.loop import compile_clock
from csm_jax.train.loss import choose_frames, num_depth_frames
from csm_jax.train.optimizer import OptimizerConfig, learning_rate
from csm_jax.train.step import (
    TrainStepConfig,
    eval_step,
    init_state,
    losses,
    mean_losses,
    train_step,
)

MODEL = fixtures.shallow()
CONFIG = TrainStepConfig(MODEL, OptimizerConfig(learning_rate=1e-2, steps=10, warmup=0), FLOAT32)
SEED = np.uint32(7)


pytestmark = pytest.mark.usefixtures("lenient")


def params():
    return fixtures.language_params(MODEL)


def random_batch(lengths=(29, 17, 40, 8), num_rows=4, seed=0) -> Batch:
    """Rows of text, then audio up to their length, in 48 positions."""
    random = np.random.default_rng(seed)
    columns = MODEL.num_codebooks + 1
    frames = random.integers(0, 30, (num_rows, 48, columns)).astype(np.int32)
    mask = np.zeros(frames.shape, bool)
    loss_mask = np.zeros(frames.shape[:2], bool)
    for row, length in enumerate(lengths):
        mask[row, :5, -1] = True
        mask[row, 5:length, :-1] = True
        loss_mask[row, 5:length] = True
    return Batch(frames, mask, loss_mask)


jitted_choose_frames = jax.jit(choose_frames, static_argnums=1)
jitted_num_depth_frames = jax.jit(num_depth_frames, static_argnums=1)


def keys(count: int):
    return jax.vmap(jax.random.key)(jnp.arange(count, dtype=jnp.uint32))


@settings(max_examples=60, deadline=None)
@given(
    loss_mask=st.lists(st.lists(st.booleans(), min_size=37, max_size=37), min_size=3, max_size=3),
    share=st.sampled_from([1 / 16, 0.1, 0.3, 0.5, 1.0]),
)
def test_a_share_of_the_frames_of_each_row_is_chosen(loss_mask, share):
    loss_mask = np.array(loss_mask)
    chosen, counts = jitted_choose_frames(loss_mask, share, keys(len(loss_mask)))
    for row, positions, kept in zip(loss_mask, np.asarray(chosen), np.asarray(counts), strict=True):
        picked = positions[kept]
        assert len(set(picked)) == len(picked) == math.ceil(share * row.sum() - 1e-6)
        assert row[picked].all()
    chosen = jitted_num_depth_frames(loss_mask, share)
    np.testing.assert_array_equal(chosen, np.asarray(counts).sum(-1))


def test_all_frames_are_chosen_equally_often():
    """A quarter of 20 frames, 4000 times: counts are within five deviations of the mean."""
    loss_mask = jnp.tile(jnp.arange(30)[None] >= 10, (4000, 1))
    chosen, counts = choose_frames(loss_mask, 0.25, keys(4000))
    histogram = np.bincount(np.asarray(chosen)[np.asarray(counts)], minlength=30)
    assert not histogram[:10].any()
    assert histogram.sum() == 4000 * 5
    deviation = (4000 * 0.25 * 0.75) ** 0.5
    assert np.abs(histogram[10:] - 1000).max() < 5 * deviation


def after_a_step(config: TrainStepConfig, batch: Batch, frozen=None, trained=None):
    state = init_state(params() if trained is None else trained, config)
    return train_step(state, frozen, batch, SEED, config=config)


def assert_close(ours, theirs, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


@pytest.mark.parametrize(
    "change",
    [{"accumulate": 4}, {"remat": False}],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_accumulation_and_remat_change_nothing(change):
    """Rows have different lengths: a mean of the means of parts would be another loss."""
    state, metrics = after_a_step(CONFIG, random_batch())
    other, other_metrics = after_a_step(dataclasses.replace(CONFIG, **change), random_batch())
    assert_close(other_metrics, metrics)
    # The first step of Adam is the sign of the gradient: compare its moments.
    assert_close(other.opt_state, state.opt_state, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.long), 4])
def test_the_gradient_equals_that_of_the_weighted_mean_loss(accumulate):
    """With every frame in the depth decoder, nothing is random."""
    config = dataclasses.replace(
        CONFIG,
        depth_share=1.0,
        depth_weight=0.7,
        codebook_weights=(2.0, 0.0, 0.5),
        accumulate=accumulate,
        remat=False,
    )

    def loss(params):
        sums = losses(params, None, random_batch(), keys(4), config=config)
        frames = random_batch().loss_mask.sum().astype(np.float32)
        depth = 0.5 * sums.depth[1:].sum()
        return (2 * sums.backbone + 0.7 * depth / (MODEL.num_codebooks - 1)) / frames

    value, gradient = jax.jit(jax.value_and_grad(loss))(params())
    _, metrics = after_a_step(config, random_batch())
    np.testing.assert_allclose(metrics.grad_norm, jax.jit(optax.global_norm)(gradient), rtol=1e-4)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)


def test_rows_with_an_empty_loss_mask_change_nothing():
    batch = random_batch()
    filled = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    _, metrics = after_a_step(CONFIG, batch)
    _, other = after_a_step(CONFIG, filled)
    assert_close(other, metrics)


def test_only_frames_of_the_loss_mask_count():
    """Other codes outside the mask, after the last frame in it, do not change the loss."""
    batch = random_batch()
    batch.loss_mask[0, 20:] = False
    _, metrics = after_a_step(CONFIG, batch)
    batch.frames[0, 20:] = 3
    batch.frames[1, 17:] = 4
    _, other = after_a_step(CONFIG, batch)
    assert other.loss == metrics.loss


def test_every_step_chooses_other_frames():
    _, first = after_a_step(CONFIG, random_batch())
    again = init_state(params(), CONFIG)._replace(step=jnp.asarray(1, jnp.int32))
    _, other = train_step(again, None, random_batch(), SEED, config=CONFIG)
    assert other.backbone_loss == first.backbone_loss
    assert other.depth_loss != first.depth_loss


def test_evaluation_counts_every_frame():
    batch = random_batch()
    everything = dataclasses.replace(CONFIG, depth_share=1.0)
    _, metrics = after_a_step(everything, batch)
    sums = eval_step(params(), None, batch, config=CONFIG)
    assert sums.num_frames == sums.num_depth_frames == batch.loss_mask.sum()
    assert_close(mean_losses(sums), (metrics.backbone_loss, metrics.depth_loss))


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted():
    """It changes nothing but the number of steps."""
    lora = LoRAConfig(rank=2)
    config = dataclasses.replace(CONFIG, lora=lora, depth_share=1.0)
    good, bad = params(), params()
    bad["codebook0_head"]["weight"] = bad["codebook0_head"]["weight"].at[3, 3].set(jnp.nan)

    def adapters():
        return jax.tree.map(jnp.asarray, init_adapters(MODEL, lora))

    state, metrics = after_a_step(config, random_batch(), bad, adapters())
    assert (metrics.skipped, metrics.skipped_in_a_row) == (1, 1)
    assert not np.isfinite(metrics.loss)
    assert_close(state.params, adapters(), rtol=0, atol=0)
    state, metrics = train_step(state, bad, random_batch(), SEED, config=config)
    assert (metrics.skipped, metrics.skipped_in_a_row) == (2, 2)
    state, metrics = train_step(state, good, random_batch(), SEED, config=config)
    assert (metrics.skipped, metrics.skipped_in_a_row, state.step) == (2, 0, 3)
    want, _ = after_a_step(config, random_batch(), good, adapters())
    assert_close(state.params, want.params, rtol=1e-6, atol=1e-9)


def test_new_adapters_do_not_change_the_model():
    lora = LoRAConfig(rank=2)
    adapted = dataclasses.replace(CONFIG, lora=lora)
    _, metrics = after_a_step(CONFIG, random_batch())
    _, other = after_a_step(adapted, random_batch(), params(), init_adapters(MODEL, lora))
    assert_close(other.loss, metrics.loss)


def test_ema_is_the_moving_average_of_parameters():
    config = dataclasses.replace(CONFIG, ema=0.75)
    state, _ = after_a_step(config, random_batch())
    want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, params(), state.params)
    assert_close(state.ema, want)


def test_bfloat16_has_nearly_the_loss_of_float32():
    """The trainable parameters stay float32."""
    bfloat16 = jnp.dtype(jnp.bfloat16)
    narrow = dataclasses.replace(CONFIG, precision=Precision(bfloat16, bfloat16))
    _, metrics = after_a_step(CONFIG, random_batch())
    state, other = after_a_step(narrow, random_batch())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert float(other.loss) == pytest.approx(float(metrics.loss), rel=2e-2)
    assert other.loss != metrics.loss


def test_weights_decay_and_norms_do_not():
    """Without a gradient, a step is only weight decay."""
    optimizer = OptimizerConfig(learning_rate=0.1, steps=10, warmup=0, weight_decay=0.5)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    batch = random_batch()
    batch.loss_mask[:] = False
    state, _ = after_a_step(config, batch)
    before = params()
    assert_close(state.params["backbone"]["norm"], before["backbone"]["norm"], rtol=0, atol=0)
    assert_close(state.params["projection"]["weight"], 0.95 * before["projection"]["weight"])


def test_the_learning_rate_rises_and_falls():
    rate = learning_rate(OptimizerConfig(learning_rate=2.0, steps=100, warmup=10, final_rate=0.1))
    rising = [float(rate(step)) for step in range(10)]
    np.testing.assert_allclose(rising, [2 * (1 / 11 + step / 11) for step in range(10)], rtol=1e-5)
    assert rate(10) == pytest.approx(2.0)
    assert rate(55) == pytest.approx(1.1)  # half of a cosine
    assert rate(100) == pytest.approx(0.2)
    linear = OptimizerConfig(2.0, steps=100, warmup=10, final_rate=0.0, decay="linear")
    steps, want = [0, 9, 10, 55, 99, 100], [2 / 11, 20 / 11, 2.0, 1.0, 2 / 90, 0.0]
    rates = [float(learning_rate(linear)(step)) for step in steps]
    np.testing.assert_allclose(rates, want, rtol=1e-5, atol=1e-7)
    rate = learning_rate(dataclasses.replace(linear, decay="constant"))
    assert rate(10) == rate(100) == 2.0


@pytest.mark.parametrize("rows", [0, 3, 6])
def test_a_batch_that_cannot_be_divided_is_refused(rows):
    with pytest.raises(InputError, match="multiple of 4"):
        check_batch_size(rows, 4, None)


def test_arrays_are_divided_along_their_longest_side():
    from jax.sharding import AbstractMesh
    from jax.sharding import PartitionSpec as P

    mesh = AbstractMesh((2, 4), AXES)
    assert fsdp_sharding((8, 12), mesh).spec == P(None, "fsdp")
    assert fsdp_sharding((12, 8), mesh).spec == P("fsdp")
    assert fsdp_sharding((8, 13), mesh).spec == P("fsdp")
    assert fsdp_sharding((7, 13), mesh).spec == P()
    assert fsdp_sharding((64,), mesh).spec == P()


def test_the_clock_of_compilation_counts_a_program_of_each_shape_once():
    program = jax.jit(lambda x: jnp.sin(x) * 3)
    seconds = []
    for size in (7, 7, 11):
        with compile_clock() as compiled:
            program(np.ones(size, np.float32))
        seconds.append(sum(compiled))
    assert seconds[1] == 0 < min(seconds[0], seconds[2])
