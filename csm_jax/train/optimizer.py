"""AdamW or Muon with warm-up and decay; gradients are clipped, and skipped if not finite."""

import functools
from dataclasses import dataclass
from typing import Any, cast

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from csm_jax.errors import InputError
from csm_jax.model.layers import Params

KINDS = ("adamw", "muon")
DECAYS = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the learning rate of a run.

    Attributes:
      learning_rate: the highest.
      steps: optimizer steps of the whole run.
      warmup: steps over which the rate rises from zero.
      decay: how the rate falls after the warmup: cosine (along half of one), linear, or constant.
      final_rate: share of the highest rate that is left at the last step.
      weight_decay: of matrices; norms have none.
      clip: largest norm of a gradient.
      beta2: decay of the mean of squared gradients.
      kind: of `KINDS`. Muon (Jordan et al., 2024) makes the update of a matrix orthogonal, and
        leaves everything else to AdamW with Nesterov's momentum; from scratch it needs fewer steps.
    """

    learning_rate: float = 1e-4
    steps: int = 1000
    warmup: int = 20
    final_rate: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    kind: str = "adamw"
    decay: str = "cosine"
    beta2: float = 0.95

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"the optimizer is {self.kind}, but must be {' or '.join(KINDS)}")
        if self.decay not in DECAYS:
            raise InputError(f"decay is {self.decay}, but must be {' or '.join(DECAYS)}")
        for name in ("final_rate", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be 0 to 1")
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}, but must be at least 1")
        if not 0 <= self.warmup < self.steps:
            raise InputError(f"warmup is {self.warmup}, but must be 0 to steps - 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, but must be more than 0")


# Skipped steps are counted; the loop decides when there are too many in a row.
_ALWAYS = 2**31 - 1


@functools.cache
def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer of a run. Its state counts the skipped steps (`optax.ApplyIfFiniteState`)."""
    make = {"adamw": _adamw, "muon": _muon}[config.kind]
    chain = optax.chain(optax.clip_by_global_norm(config.clip), make(config))
    return optax.apply_if_finite(chain, max_consecutive_errors=_ALWAYS)


def update(
    config: OptimizerConfig, gradients: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    """A step of the optimizer: the next parameters, and the next state of the optimizer."""
    updates, opt_state = make_optimizer(config).update(gradients, opt_state, params)
    # optax's type is that of any pytree.
    return cast(Params, optax.apply_updates(params, updates)), opt_state


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate(config),
        b1=0.9,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_decays,
    )


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    return muon(
        learning_rate(config),
        weight_decay=config.weight_decay,
        adam_b1=0.9,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=_as_matrices,
        consistent_rms=_MUON_RMS,
    )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate by step, counted from 0."""
    first, peak = config.learning_rate / (config.warmup + 1), config.learning_rate
    last = peak * (1.0 if config.decay == "constant" else config.final_rate)
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(first, peak, config.warmup, config.steps, last)
    rise = optax.linear_schedule(first, peak, config.warmup)
    fall = optax.linear_schedule(peak, last, config.steps - config.warmup)
    return optax.join_schedules([rise, fall], [config.warmup])


def _decays(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


# The size of AdamW's updates, so that one rate serves both (Liu et al., 2025).
_MUON_RMS = 0.2


def _as_matrices(params: optax.Params) -> Any:
    """Which axes of a parameter are the inputs and outputs of a matrix; None if it is not one.

    Embeddings, codebooks and heads are not, because their rows are entries of a table.
    """

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        *owner, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if name != "weight" or any(part.endswith(("head", "heads")) for part in owner):
            return None
        if leaf.ndim == 2:  # [out, in]
            return MuonDimensionNumbers((1,), (0,))
        if leaf.ndim == 3:  # a convolution, [K, in, out]
            return MuonDimensionNumbers((0, 1), (2,))
        # Transposed, [M, in, stride, out]; a depthwise one is not a matrix.
        return None if leaf.shape[-1] == 1 else MuonDimensionNumbers((0, 1), (2, 3))

    return jax.tree.map_with_path(axes, params)
