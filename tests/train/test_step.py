"""The loss's choice of frames, and the step: what must change nothing, and what must."""

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

import csm_jax
from csm_jax import checkpoint
from csm_jax.errors import InputError
from csm_jax.lora import LoRAConfig, init_adapters
from csm_jax.precision import FLOAT32, Precision
from csm_jax.train import placement
from csm_jax.train.batches import Batch
from csm_jax.train.loss import choose_frames, num_depth_frames
from csm_jax.train.optimiser import OptimiserConfig, learning_rate
from csm_jax.train.step import Recipe, eval_step, init_state, losses, mean_losses, train_step

CONFIG = csm_jax.tiny()
RECIPE = Recipe(CONFIG, OptimiserConfig(learning_rate=1e-2, steps=10, warmup=0), FLOAT32)
SEED = np.uint32(7)


pytestmark = pytest.mark.usefixtures("lenient")


def params():
    """Fresh every time: a step uses them up."""
    flat = {path: jnp.array(array) for path, array in fixtures.params().items()}
    return checkpoint.unflatten(flat, checkpoint.param_shapes(CONFIG))["csm"]


def random_batch(lengths=(29, 17, 40, 8), num_rows=4, seed=0) -> Batch:
    """Rows of text, then audio up to their length, in 48 positions."""
    random = np.random.default_rng(seed)
    columns = CONFIG.num_codebooks + 1
    frames = random.integers(0, 30, (num_rows, 48, columns)).astype(np.int32)
    mask = np.zeros(frames.shape, bool)
    targets = np.zeros(frames.shape[:2], bool)
    for row, length in enumerate(lengths):
        mask[row, :5, -1] = True
        mask[row, 5:length, :-1] = True
        targets[row, 5:length] = True
    return Batch(frames, mask, targets)


def keys(count: int):
    return jax.vmap(jax.random.key)(jnp.arange(count, dtype=jnp.uint32))


@settings(max_examples=60, deadline=None)
@given(
    targets=st.lists(st.lists(st.booleans(), min_size=37, max_size=37), min_size=1, max_size=4),
    share=st.sampled_from([1 / 16, 0.1, 0.3, 0.5, 1.0]),
)
def test_a_share_of_each_row_is_chosen_once(targets, share):
    targets = np.array(targets)
    chosen, counts = choose_frames(jnp.asarray(targets), share, keys(len(targets)))
    for row, positions, kept in zip(targets, np.asarray(chosen), np.asarray(counts), strict=True):
        picked = positions[kept]
        assert len(set(picked)) == len(picked) == math.ceil(share * row.sum() - 1e-6)
        assert row[picked].all()
    np.testing.assert_array_equal(num_depth_frames(jnp.asarray(targets), share), counts.sum(-1))


def test_every_frame_is_as_likely():
    """A quarter of 20 frames, 4000 times: the counts are within five deviations of their mean."""
    targets = jnp.tile(jnp.arange(30)[None] >= 10, (4000, 1))
    chosen, counts = choose_frames(targets, 0.25, keys(4000))
    histogram = np.bincount(np.asarray(chosen)[np.asarray(counts)], minlength=30)
    assert not histogram[:10].any()
    assert histogram.sum() == 4000 * 5
    deviation = (4000 * 0.25 * 0.75) ** 0.5
    assert np.abs(histogram[10:] - 1000).max() < 5 * deviation


def after_a_step(recipe: Recipe, batch: Batch, frozen=None, trained=None):
    state = init_state(params() if trained is None else trained, recipe)
    return train_step(state, frozen, batch, SEED, recipe=recipe)


def assert_close(ours, theirs, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


@pytest.mark.parametrize(
    "change",
    [{"accumulate": 4}, {"remat": False}],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_how_a_step_is_computed_changes_nothing(change):
    """Rows are unequally long: a mean of the means of parts would be another loss."""
    state, metrics = after_a_step(RECIPE, random_batch())
    other, other_metrics = after_a_step(dataclasses.replace(RECIPE, **change), random_batch())
    assert_close(other_metrics, metrics)
    # The first step of Adam is the sign of the gradient: compare its moments.
    assert_close(other.optimiser, state.optimiser, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.long), 4])
def test_the_gradient_is_that_of_the_mean_loss(accumulate):
    """With every frame in the depth decoder, nothing is left to chance."""
    recipe = dataclasses.replace(
        RECIPE, depth_share=1.0, depth_weight=0.7, accumulate=accumulate, remat=False
    )

    def loss(params):
        sums = losses(params, None, random_batch(), keys(4), recipe=recipe)
        backbone, depth = mean_losses(sums)
        return backbone + 0.7 * depth

    want = optax.global_norm(jax.jit(jax.grad(loss))(params()))
    _, metrics = after_a_step(recipe, random_batch())
    np.testing.assert_allclose(metrics.grad_norm, want, rtol=1e-4)


def test_rows_without_a_target_change_nothing():
    batch = random_batch()
    filled = Batch(*(np.concatenate([x, np.zeros_like(x)]) for x in batch))
    _, metrics = after_a_step(RECIPE, batch)
    _, other = after_a_step(RECIPE, filled)
    assert_close(other, metrics)


def test_only_targets_are_learnt():
    """Another code in a row that is no target, and after all that are, is not noticed."""
    batch = random_batch()
    batch.targets[0, 20:] = False
    _, metrics = after_a_step(RECIPE, batch)
    batch.frames[0, 20:] = 3
    batch.frames[1, 17:] = 4
    _, other = after_a_step(RECIPE, batch)
    assert other.loss == metrics.loss


def test_share_and_step_choose_other_frames():
    _, first = after_a_step(RECIPE, random_batch())
    again = init_state(params(), RECIPE)._replace(step=jnp.asarray(1, jnp.int32))
    _, other = train_step(again, None, random_batch(), SEED, recipe=RECIPE)
    assert other.backbone_loss == first.backbone_loss
    assert other.depth_loss != first.depth_loss


def test_evaluation_counts_every_frame():
    batch = random_batch()
    everything = dataclasses.replace(RECIPE, depth_share=1.0)
    _, metrics = after_a_step(everything, batch)
    sums = eval_step(params(), None, batch, recipe=RECIPE)
    assert sums.num_frames == sums.num_depth_frames == batch.targets.sum()
    assert_close(mean_losses(sums), (metrics.backbone_loss, metrics.depth_loss))


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    """As if it had not been, but for the number of steps."""
    lora = LoRAConfig(rank=2)
    recipe = dataclasses.replace(RECIPE, lora=lora, depth_share=1.0)
    good, bad = params(), params()
    bad["codebook0_head"]["weight"] = bad["codebook0_head"]["weight"].at[3, 3].set(jnp.nan)

    def adapters():
        return jax.tree.map(jnp.asarray, init_adapters(CONFIG, lora))

    state, metrics = after_a_step(recipe, random_batch(), bad, adapters())
    assert (metrics.skipped, metrics.skipped_in_a_row) == (1, 1)
    assert not np.isfinite(metrics.loss)
    assert_close(state.params, adapters(), rtol=0, atol=0)
    state, metrics = train_step(state, bad, random_batch(), SEED, recipe=recipe)
    assert (metrics.skipped, metrics.skipped_in_a_row) == (2, 2)
    state, metrics = train_step(state, good, random_batch(), SEED, recipe=recipe)
    assert (metrics.skipped, metrics.skipped_in_a_row, state.step) == (2, 0, 3)
    want, _ = after_a_step(recipe, random_batch(), good, adapters())
    assert_close(state.params, want.params, rtol=1e-6, atol=1e-9)


def test_new_adapters_change_nothing_yet():
    lora = LoRAConfig(rank=2)
    adapted = dataclasses.replace(RECIPE, lora=lora)
    _, metrics = after_a_step(RECIPE, random_batch())
    _, other = after_a_step(adapted, random_batch(), params(), init_adapters(CONFIG, lora))
    assert_close(other.loss, metrics.loss)


def test_the_average_of_parameters():
    recipe = dataclasses.replace(RECIPE, ema=0.75)
    state, _ = after_a_step(recipe, random_batch())
    want = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, params(), state.params)
    assert_close(state.ema, want)


def test_narrow_types_learn_about_the_same():
    """Masters stay float32; the loss is as far off as bfloat16's 8 bits make it."""
    bfloat16 = jnp.dtype(jnp.bfloat16)
    narrow = dataclasses.replace(RECIPE, precision=Precision(bfloat16, bfloat16))
    _, metrics = after_a_step(RECIPE, random_batch())
    state, other = after_a_step(narrow, random_batch())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert float(other.loss) == pytest.approx(float(metrics.loss), rel=2e-2)
    assert other.loss != metrics.loss


def test_weights_decay_and_norms_do_not():
    """Without a gradient, a step is its decay alone."""
    optimiser = OptimiserConfig(learning_rate=0.1, steps=10, warmup=0, weight_decay=0.5)
    recipe = dataclasses.replace(RECIPE, optimiser=optimiser)
    batch = random_batch()
    batch.targets[:] = False
    state, _ = after_a_step(recipe, batch)
    before = params()
    assert_close(state.params["backbone"]["norm"], before["backbone"]["norm"], rtol=0, atol=0)
    assert_close(state.params["projection"]["weight"], 0.95 * before["projection"]["weight"])


def test_the_rate_rises_and_falls():
    rate = learning_rate(OptimiserConfig(learning_rate=2.0, steps=100, warmup=10, final_rate=0.1))
    rising = [float(rate(step)) for step in range(10)]
    np.testing.assert_allclose(rising, [2 * (1 / 11 + step / 11) for step in range(10)], rtol=1e-5)
    assert rate(10) == pytest.approx(2.0)
    assert rate(55) == pytest.approx(1.1)  # half of a cosine
    assert rate(100) == pytest.approx(0.2)


@pytest.mark.parametrize("rows", [0, 3, 6])
def test_rows_that_cannot_be_divided(rows):
    with pytest.raises(InputError, match="multiple of 4"):
        placement.check_rows(rows, 4, None)


def test_what_is_divided_is_divided_along_its_longest_side():
    from jax.sharding import AbstractMesh
    from jax.sharding import PartitionSpec as P

    mesh = AbstractMesh((2, 4), placement.AXES)
    assert placement.sharding((8, 12), mesh).spec == P(None, "fsdp")
    assert placement.sharding((12, 8), mesh).spec == P("fsdp")
    assert placement.sharding((8, 13), mesh).spec == P("fsdp")
    assert placement.sharding((7, 13), mesh).spec == P()
    assert placement.sharding((64,), mesh).spec == P()
