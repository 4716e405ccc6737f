"""One step of training, as a pure function of the state and a batch."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from csm_jax.config import CSMConfig
from csm_jax.lora import LoRAConfig, attach
from csm_jax.model import CSM, bind
from csm_jax.precision import Precision
from csm_jax.train.batches import Batch
from csm_jax.train.loss import Sums, num_depth_frames, summed_losses
from csm_jax.train.optimiser import OptimiserConfig, make_optimiser
from csm_jax.train.placement import keep_placed, keep_whole

Array = jax.Array
Params = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """All that a step is compiled for.

    Attributes:
      lora: the adapters to train; None trains everything but the codec.
      precision: what is computed in. What is trained is held in float32.
      depth_share: of the frames, those that the depth decoder learns from.
      depth_weight: of its loss, where the backbone's has 1.
      remat: compute blocks again in the backward pass instead of keeping what is inside them.
      accumulate: parts of a batch, one after another.
      ema: how much of the moving average of parameters stays at a step; 0 keeps none.
      mesh: of `placement.make_mesh`.
    """

    config: CSMConfig
    optimiser: OptimiserConfig
    precision: Precision
    lora: LoRAConfig | None = None
    depth_share: float = 1 / 16
    depth_weight: float = 1.0
    remat: bool = True
    accumulate: int = 1
    ema: float = 0.0
    mesh: Mesh | None = None


class TrainState(NamedTuple):
    """What a run goes on from, next to its place in the data.

    Attributes:
      step: int32 [], batches seen, those that were skipped included.
      params: float32; all parameters of the model, or its adapters.
      optimiser: optax's.
      ema: moving average of `params`, or None.
    """

    step: Array
    params: Any
    optimiser: optax.OptState
    ema: Any | None


class Metrics(NamedTuple):
    """Float32 [] each, int32 [] where it says so.

    Attributes:
      loss: what is minimised.
      backbone_loss, depth_loss: nats a code.
      grad_norm: before clipping.
      num_frames: int32, frames of audio that counted.
      skipped: int32, steps so far with a gradient that is not finite; they change nothing.
      skipped_in_a_row: int32, the last of these without a good one between.
    """

    loss: Array
    backbone_loss: Array
    depth_loss: Array
    grad_norm: Array
    num_frames: Array
    skipped: Array
    skipped_in_a_row: Array


def init_state(params: Any, recipe: Recipe) -> TrainState:
    """The state before the first step; `params` are float32."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimiser=make_optimiser(recipe.optimiser).init(params),
        # A copy: the step donates both.
        ema=jax.tree.map(jnp.copy, params) if recipe.ema else None,
    )


@functools.partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def train_step(
    state: TrainState, frozen: Params | None, batch: Batch, seed: Array, *, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """Learns from one batch. `state` is donated: use the one returned.

    Args:
      frozen: with adapters, the model's parameters, in `recipe.precision`; else None.
      batch: rows [B, T, ...], B a multiple of `recipe.accumulate`.
      seed: uint32 []; with the step it chooses the frames for the depth decoder.
    """
    gradients, sums = _gradients(state, frozen, batch, seed, recipe)
    updates, optimiser = make_optimiser(recipe.optimiser).update(
        gradients, state.optimiser, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if recipe.ema:
        ema = optax.incremental_update(params, ema, 1 - recipe.ema)
    state = keep_placed(TrainState(state.step + 1, params, optimiser, ema), recipe.mesh)
    backbone, depth = mean_losses(sums)
    metrics = Metrics(
        loss=backbone + recipe.depth_weight * depth,
        backbone_loss=backbone,
        depth_loss=depth,
        grad_norm=optax.global_norm(gradients),
        num_frames=sums.num_frames,
        skipped=optimiser.total_notfinite,
        skipped_in_a_row=optimiser.notfinite_count,
    )
    return state, metrics


def mean_losses(sums: Sums) -> tuple[Array, Array]:
    """Nats a code of codebook 0, and of the others."""
    num_codes = _at_least_1(sums.num_depth_frames) * sums.depth.shape[0]
    return sums.backbone / _at_least_1(sums.num_frames), jnp.sum(sums.depth) / num_codes


def _at_least_1(count: Array) -> Array:
    """As float32, to divide by: a batch may have nothing that is to be learnt."""
    return jnp.maximum(count, 1).astype(jnp.float32)


def _gradients(
    state: TrainState, frozen: Params | None, batch: Batch, seed: Array, recipe: Recipe
) -> tuple[Any, Sums]:
    """Of the mean loss over the whole batch, its parts one after another."""
    rows = len(batch.frames)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
    # A part is weighed by its frames, of which the others may have more.
    num_frames = _at_least_1(jnp.sum(batch.targets))
    num_codes = _at_least_1(jnp.sum(num_depth_frames(batch.targets, recipe.depth_share)))
    num_codes = num_codes * (recipe.config.num_codebooks - 1)

    def loss(params: Any, part: tuple[Batch, Array]) -> tuple[Array, Sums]:
        sums = losses(params, frozen, *part, recipe=recipe)
        depth = recipe.depth_weight * jnp.sum(sums.depth) / num_codes
        return sums.backbone / num_frames + depth, sums

    def add(total: tuple[Any, Sums], part: tuple[Batch, Array]):
        gradients, sums = jax.grad(loss, has_aux=True)(state.params, part)
        return jax.tree.map(jnp.add, total, (gradients, sums)), None

    if recipe.accumulate == 1:
        return jax.grad(loss, has_aux=True)(state.params, (batch, keys))
    parts = jax.tree.map(lambda x: _cut(x, recipe.accumulate), (batch, keys))
    shapes = jax.eval_shape(
        jax.grad(loss, has_aux=True), state.params, jax.tree.map(lambda x: x[0], parts)
    )
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def _cut(rows: Array, parts: int) -> Array:
    """[B, ...] to [parts, B / parts, ...]: every part has rows of every device."""
    return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)


def losses(
    params: Any, frozen: Params | None, batch: Batch, keys: Array, *, recipe: Recipe
) -> Sums:
    """Losses of a batch, of what is trained together with what is not."""
    model = assemble(params, frozen, recipe)
    return summed_losses(model, *batch, keys, depth_share=recipe.depth_share, remat=recipe.remat)


def assemble(params: Any, frozen: Params | None, recipe: Recipe) -> CSM:
    """The model to compute with, inside a jitted function."""
    if recipe.lora is None:
        whole = keep_whole(compute_params(params, recipe.precision), recipe.mesh)
        return bind(recipe.config, whole)
    model = bind(recipe.config, keep_whole(frozen, recipe.mesh))
    attach(model, params, recipe.lora.scale)
    return model


def compute_params(params: Params, precision: Precision) -> Params:
    """float32 parameters in the types to compute in.

    Tables stay tables of bfloat16 even on a CPU (`layers.pack`): bits have no gradient.
    """

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        is_norm = path[-1].key == "scale"
        return leaf.astype(precision.activations if is_norm else precision.weights)

    return jax.tree.map_with_path(cast, params)


@functools.partial(jax.jit, static_argnames="recipe")
def eval_step(params: Any, frozen: Params | None, batch: Batch, *, recipe: Recipe) -> Sums:
    """Losses of a batch with every frame counted."""
    everything = dataclasses.replace(recipe, depth_share=1.0, remat=False)
    keys = jax.vmap(jax.random.key)(jnp.zeros(len(batch.frames), jnp.uint32))
    return losses(params, frozen, batch, keys, recipe=everything)
