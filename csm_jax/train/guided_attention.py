"""Guided attention: a loss that draws attention heads to the word that is being spoken.

A model that learns to speak from nothing must find out which part of the text each frame speaks.
The loss says it to a few heads of the backbone: the negative logarithm of the attention on the rows
of text that are spoken in a frame, where the frame is predicted (after Tachibana et al., 2017).
Later these heads time the words (`align/`).
"""

from dataclasses import dataclass

import jax.numpy as jnp

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.model.layers import AnyArray, Array
from csm_jax.model.llama import Head

# Added to the attention, whose logarithm would be infinite where it is zero.
_LEAST = 1e-6


@dataclass(frozen=True)
class GuidedAttention:
    """The heads that are guided, and how much.

    Attributes:
      heads: of the backbone, at least one.
      weight: of the loss at the first step, where the backbone's has 1.
      steps: over which the weight falls to 0, in a line.
    """

    heads: tuple[Head, ...]
    weight: float
    steps: int

    def check(self, model: CSMConfig) -> None:
        """Raises `InputError` for heads that the model does not have."""
        layers, heads = model.backbone.num_layers, model.backbone.num_heads
        for layer, head in self.heads:
            if not (0 <= layer < layers and 0 <= head < heads):
                raise InputError(
                    f"there is no attention head {layer}.{head}: the backbone has layers "
                    f"0 to {layers - 1} with heads 0 to {heads - 1}"
                )

    def weight_at(self, step: Array) -> Array:
        """The weight at a step, float32 []."""
        left = 1 - step.astype(jnp.float32) / self.steps
        return self.weight * jnp.maximum(left, 0)


def guided_frames(spoken: AnyArray, loss_mask: AnyArray) -> AnyArray:
    """The frames that are guided: those of the loss mask whose text is known, bool [B, T].

    Args:
      spoken: int32 [B, T, 2], of each frame the first position of the text that is spoken in it,
        and the one after the last; equal where it is not known.
      loss_mask: bool [B, T]; context is not guided.
    """
    return loss_mask & (spoken[..., 0] < spoken[..., 1])


def guided_entropy(attention: AnyArray, spoken: AnyArray, loss_mask: AnyArray) -> Array:
    """The negative logarithm of the attention on what is spoken, summed over guided frames.

    Args:
      attention: float32 [B, N, T, S] of N heads; row t - 1 predicts frame t.
      spoken, loss_mask: as for `guided_frames`.

    Returns:
      float32 [], the mean of the heads.
    """
    positions = jnp.arange(attention.shape[-1], dtype=jnp.int32)
    first, end = spoken[:, 1:, :1], spoken[:, 1:, 1:]
    is_spoken = (first <= positions) & (positions < end)  # [B, T - 1, S]
    on_spoken = jnp.sum(jnp.where(is_spoken[:, None], attention[:, :, :-1], 0), axis=-1)
    entropy = -jnp.log(on_spoken + _LEAST).mean(axis=1)  # [B, T - 1]
    return jnp.sum(jnp.where(guided_frames(spoken, loss_mask)[:, 1:], entropy, 0))
