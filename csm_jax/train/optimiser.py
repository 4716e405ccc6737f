"""AdamW with warm-up and cosine, clipped, and deaf to gradients that are not finite."""

import functools
from dataclasses import dataclass

import jax
import optax

from csm_jax.errors import InputError


@dataclass(frozen=True)
class OptimiserConfig:
    """Attributes:
    learning_rate: the highest.
    steps: of the whole run; the rate falls along half a cosine to `final_rate` of the highest.
    warmup: steps over which it rises from zero.
    weight_decay: of matrices; norms are left alone.
    clip: largest norm of a gradient.
    """

    learning_rate: float = 1e-4
    steps: int = 1000
    warmup: int = 20
    final_rate: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}, but must be at least 1")
        if not 0 <= self.warmup < self.steps:
            raise InputError(f"warmup is {self.warmup}, but must be 0 to steps - 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, but must be more than 0")


# Skipped steps are counted, and it is the loop that loses patience.
_ALWAYS = 2**31 - 1


@functools.cache
def make_optimiser(config: OptimiserConfig) -> optax.GradientTransformation:
    """The optimiser of a run. Its state counts the steps it has skipped (`ApplyIfFiniteState`)."""
    adamw = optax.adamw(
        learning_rate(config),
        b1=0.9,
        b2=0.95,
        weight_decay=config.weight_decay,
        mask=_decays,
    )
    chain = optax.chain(optax.clip_by_global_norm(config.clip), adamw)
    return optax.apply_if_finite(chain, max_consecutive_errors=_ALWAYS)


def learning_rate(config: OptimiserConfig) -> optax.Schedule:
    """Of a step, counted from 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_rate,
    )


def _decays(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
