"""One training step, as a pure function of the train state and a batch."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.model.csm import CSM, bind
from csm_jax.model.layers import Array, Params
from csm_jax.model.lora import LoRAConfig, attach
from csm_jax.model.precision import Precision, role_of
from csm_jax.model.random_numbers import random_key
from csm_jax.train.batches import Batch
from csm_jax.train.fsdp import keep_divided, keep_replicated
from csm_jax.train.guided_attention import GuidedAttention, guided_frames
from csm_jax.train.loss import LossSums, num_depth_frames, summed_losses
from csm_jax.train.optimizer import OptimizerConfig, make_optimizer, update


@dataclass(frozen=True)
class TrainStepConfig:
    """Everything that a step is compiled for.

    Attributes:
      model: sizes of the model.
      optimizer: the optimizer and its learning rate.
      precision: the types to compute in. Trainable parameters are held in float32.
      lora: the adapters to train; None trains parameters themselves.
      depth_share: share of the frames that train the depth decoder.
      depth_weight: of the depth decoder's loss, where the backbone's has 1.
      codebook_weights: of the losses of single codebooks, from codebook 0 on, besides; the last one
        holds for all that follow. Without any, all are 1.
      remat: recompute activations in the backward pass, to save memory.
      accumulate: micro-batches that a batch is computed in, one after another.
      ema: decay of the moving average of the trained parameters; 0 keeps none.
      mesh: of `fsdp.make_fsdp_mesh`.
      guided: the attention heads that are guided; batches have `spoken` then. None guides none.
    """

    model: CSMConfig
    optimizer: OptimizerConfig
    precision: Precision
    lora: LoRAConfig | None = None
    depth_share: float = 1 / 16
    depth_weight: float = 1.0
    codebook_weights: tuple[float, ...] = ()
    remat: bool = True
    accumulate: int = 1
    ema: float = 0.0
    mesh: Mesh | None = None
    guided: GuidedAttention | None = None

    def __post_init__(self):
        weights, count = self.codebook_weights, self.model.num_codebooks
        if len(weights) > count:
            raise InputError(
                f"codebook_weights has {len(weights)} weights, but there are {count} codebooks"
            )
        if weights and not (np.isfinite(weights).all() and min(weights) >= 0 < max(weights)):
            listed = ",".join(f"{weight:g}" for weight in weights)
            raise InputError(f"codebook_weights is {listed}, but must be numbers from 0, not all 0")

    @property
    def loss_weights(self) -> np.ndarray:
        """The weight of the mean loss of each codebook, float32 [Q]."""
        given = np.asarray(self.codebook_weights or (1.0,), np.float32)
        count = self.model.num_codebooks
        weights = np.pad(given, (0, count - len(given)), mode="edge")
        weights[1:] *= self.depth_weight / (count - 1)
        return weights


class TrainState(NamedTuple):
    """The state that a run is resumed from, beside its position in the data.

    Attributes:
      step: int32 [], batches so far, those with a skipped update included.
      params: the trained ones, float32: all parameters of the model, some parts, or adapters.
      opt_state: optax's.
      ema: moving average of `params`, or None.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params | None


class Metrics(NamedTuple):
    """Measurements of a step, float32 [] unless it says int32.

    Attributes:
      loss: the weighted sum of the losses of codes.
      backbone_loss, depth_loss: nats a code.
      grad_norm: before clipping.
      num_frames: int32, frames in the loss mask.
      skipped: int32, steps so far whose gradient was not finite; they change nothing.
      skipped_in_a_row: int32, how many of the last steps were skipped.
      guided_loss: nats a frame, of guided attention; None without.
    """

    loss: Array
    backbone_loss: Array
    depth_loss: Array
    grad_norm: Array
    num_frames: Array
    skipped: Array
    skipped_in_a_row: Array
    guided_loss: Array | None = None


def init_state(params: Params, config: TrainStepConfig) -> TrainState:
    """The state before the first step; `params` are the trained ones, float32."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config.optimizer).init(params),
        # A copy: the step donates both.
        ema=jax.tree.map(jnp.copy, params) if config.ema else None,
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(
    state: TrainState, frozen: Params | None, batch: Batch, seed: Array, *, config: TrainStepConfig
) -> tuple[TrainState, Metrics]:
    """Trains on one batch. `state` is donated: use the one returned.

    Args:
      frozen: the parameters that are not trained, in `config.precision`: with adapters the model's,
        else of the parts that `state.params` has not; None if there are none.
      batch: rows [B, T, ...], B a multiple of `config.accumulate`.
      seed: uint32 []; with the step it chooses the frames for the depth decoder.
    """
    gradients, sums = _gradients(state, frozen, batch, seed, config)
    params, opt_state = update(config.optimizer, gradients, state.opt_state, state.params)
    ema = state.ema
    if ema is not None:
        ema = cast(Params, optax.incremental_update(params, ema, 1 - config.ema))
    state = keep_divided(TrainState(state.step + 1, params, opt_state, ema), config.mesh)
    backbone, depth = mean_losses(sums)
    num_frames = _at_least_1(sums.num_frames), _at_least_1(sums.num_depth_frames)
    metrics = Metrics(
        loss=_weighted_loss(sums, *num_frames, config),
        backbone_loss=backbone,
        depth_loss=depth,
        grad_norm=optax.global_norm(gradients),
        num_frames=sums.num_frames,
        skipped=opt_state.total_notfinite,
        skipped_in_a_row=opt_state.notfinite_count,
        guided_loss=_mean_guided(sums),
    )
    return state, metrics


def mean_losses(sums: LossSums) -> tuple[Array, Array]:
    """Nats a code of codebook 0, and of the others."""
    num_codes = _at_least_1(sums.num_depth_frames) * sums.depth.shape[0]
    return sums.backbone / _at_least_1(sums.num_frames), jnp.sum(sums.depth) / num_codes


def _weighted_loss(
    sums: LossSums, num_frames: Array, num_depth_frames: Array, config: TrainStepConfig
) -> Array:
    """The loss of codes that a step lowers, float32 []."""
    first, *others = config.loss_weights
    depth = jnp.sum(jnp.asarray(others, jnp.float32) * sums.depth)
    return jnp.float32(first) * sums.backbone / num_frames + depth / num_depth_frames


def _mean_guided(sums: LossSums) -> Array | None:
    if sums.guided is None or sums.num_guided is None:
        return None
    return sums.guided / _at_least_1(sums.num_guided)


def _at_least_1(count: Array) -> Array:
    """A count as a float32 divisor: the loss mask of a batch may be empty."""
    return jnp.maximum(count, 1).astype(jnp.float32)


def _gradients(
    state: TrainState, frozen: Params | None, batch: Batch, seed: Array, config: TrainStepConfig
) -> tuple[Params, LossSums]:
    """The gradients of the mean loss over the whole batch, computed part by part."""
    rows = len(batch.frames)
    key = jax.random.fold_in(random_key(seed), state.step)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
    # A part is weighed by its frames: parts may have different numbers of them.
    num_frames = _at_least_1(jnp.sum(batch.loss_mask))
    num_chosen = _at_least_1(jnp.sum(num_depth_frames(batch.loss_mask, config.depth_share)))
    guided_weight = _guided_weight(state, batch, config)

    def loss(params: Params, part: tuple[Batch, Array]) -> tuple[Array, LossSums]:
        sums = losses(params, frozen, *part, config=config)
        total = _weighted_loss(sums, num_frames, num_chosen, config)
        if guided_weight is not None and sums.guided is not None:
            total += guided_weight * sums.guided
        return total, sums

    def add(
        total: tuple[Params, LossSums], part: tuple[Batch, Array]
    ) -> tuple[tuple[Params, LossSums], None]:
        gradients, sums = jax.grad(loss, has_aux=True)(state.params, part)
        return jax.tree.map(jnp.add, total, (gradients, sums)), None

    if config.accumulate == 1:
        return jax.grad(loss, has_aux=True)(state.params, (batch, keys))
    parts = jax.tree.map(lambda x: _cut(x, config.accumulate), (batch, keys))
    shapes = jax.eval_shape(
        jax.grad(loss, has_aux=True), state.params, jax.tree.map(lambda x: x[0], parts)
    )
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def _guided_weight(state: TrainState, batch: Batch, config: TrainStepConfig) -> Array | None:
    """The weight of each guided frame in the loss of a batch, float32 []."""
    if config.guided is None or batch.spoken is None:
        return None
    count = _at_least_1(jnp.sum(guided_frames(batch.spoken, batch.loss_mask)))
    return config.guided.weight_at(state.step) / count


def _cut(rows: Array, parts: int) -> Array:
    """[B, ...] to [parts, B / parts, ...]: every part has rows of every device."""
    return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)


def losses(
    params: Params, frozen: Params | None, batch: Batch, keys: Array, *, config: TrainStepConfig
) -> LossSums:
    """Losses of a batch, of trainable and frozen parameters together."""
    model = assemble(params, frozen, config)
    heads = config.guided.heads if config.guided else ()
    return summed_losses(
        model, batch, keys, depth_share=config.depth_share, remat=config.remat, heads=heads
    )


def assemble(params: Params, frozen: Params | None, config: TrainStepConfig) -> CSM:
    """The model to compute with, inside a jitted function."""
    if config.lora is None:
        narrow = {**(frozen or {}), **compute_params(params, config.precision)}
        return bind(config.model, keep_replicated(narrow, config.mesh))
    if frozen is None:
        raise ValueError("adapters are trained beside the model's parameters, which are missing")
    model = bind(config.model, keep_replicated(frozen, config.mesh))
    attach(model, params, config.lora.scale)
    return model


def compute_params(params: Params, precision: Precision) -> Params:
    """The model's float32 parameters in the types to compute in.

    Tables stay bfloat16 even where a CPU would hold bits (`layers.pack`): bits have no gradient.
    """

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.astype(precision.dtype_of(role_of(f"csm/{name}")))

    return jax.tree.map_with_path(cast, params)


@functools.partial(jax.jit, static_argnames="config")
def eval_step(
    params: Params, frozen: Params | None, batch: Batch, *, config: TrainStepConfig
) -> LossSums:
    """Losses of a batch with every frame counted."""
    everything = dataclasses.replace(config, depth_share=1.0, remat=False, guided=None)
    keys = jax.vmap(random_key)(jnp.zeros(len(batch.frames), jnp.uint32))
    return losses(params, frozen, batch, keys, config=everything)
