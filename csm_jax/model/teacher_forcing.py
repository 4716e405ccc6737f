"""Teacher-forced frames: every code is predicted from the given codes before it, all at once.

Frame t is predicted from the backbone's state at row t - 1, its codebooks 1 and up by the depth
decoder from that state and the frame's own codes before. Training, scores and states share this.
"""

from typing import NamedTuple

import jax.numpy as jnp

from csm_jax.model.csm import CSM
from csm_jax.model.layers import AnyArray, Array


class GivenFrames(NamedTuple):
    """Frames of a batch, and the states that predict them.

    Attributes:
      states: [B, K, D], of the backbone, one row before each frame.
      codes: int32 [B, K, Q].
    """

    states: Array
    codes: Array


def frames_at(hidden: Array, frames: AnyArray, positions: Array) -> GivenFrames:
    """The frames at some positions of a batch.

    Args:
      hidden: [B, T, D], of `CSM.hidden(frames, mask)`.
      frames: int32 [B, T, Q + 1].
      positions: int32 [B, K], between 0 and T - 1. What is predicted of a row's first frame is
        undefined.
    """
    before = jnp.maximum(positions - 1, 0)
    states = jnp.take_along_axis(hidden, before[..., None], axis=1)
    codes = jnp.take_along_axis(jnp.asarray(frames[..., :-1]), positions[..., None], axis=1)
    return GivenFrames(states, codes)


def frames_from(hidden: Array, frames: AnyArray, start: AnyArray, num_frames: int) -> GivenFrames:
    """So many frames from position `start` [B] of each row on; beyond a row, its last one."""
    offsets = jnp.arange(num_frames, dtype=jnp.int32)
    positions = jnp.asarray(start)[:, None] + offsets[None]
    return frames_at(hidden, frames, jnp.minimum(positions, frames.shape[1] - 1))


def frame_logits(model: CSM, states: Array, codes: AnyArray) -> Array:
    """Logits of all codebooks, float32 [B, Q, V], of codes [B, Q] predicted from states [B, D]."""
    first = model.backbone_logits(states)[:, None]
    return jnp.concatenate([first, model.depth_logits(states, codes)], axis=1)
