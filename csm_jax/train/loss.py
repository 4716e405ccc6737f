"""What training minimises: cross entropy of every code, given all codes before it.

Frame t is predicted from the backbone's state at row t - 1, its other codebooks by the depth
decoder from that state and the codebooks before. The frame of zeros that ends a turn is a frame
like the others. It is the loss of transformers' `CsmForConditionalGeneration(labels=...)`.

The depth decoder sees a random share of the frames only (compute amortisation, as the authors of
CSM describe it): it would take more memory than the backbone, and learns as well from a sixteenth.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from csm_jax.model import CSM

Array = jax.Array


class Sums(NamedTuple):
    """Losses as sums and what to divide them by, so that parts of a batch add up.

    Attributes:
      backbone: float32 [], summed over frames.
      depth: float32 [Q - 1], of codebooks 1 and up, summed over the chosen frames.
      num_frames: int32 [], frames that count.
      num_depth_frames: int32 [], of these the frames that the depth decoder saw.
    """

    backbone: Array
    depth: Array
    num_frames: Array
    num_depth_frames: Array


def summed_losses(
    model: CSM,
    frames: Array,
    mask: Array,
    targets: Array,
    keys: Array,
    *,
    depth_share: float,
    remat: bool = False,
) -> Sums:
    """Teacher-forced losses of a batch.

    Args:
      frames, mask: [B, T, Q + 1], int32 and bool, padded on the right.
      targets: bool [B, T], rows of audio that are to be learnt; never the first of a row.
      keys: PRNG keys [B], which choose the frames for the depth decoder.
      depth_share: of the targets, 0 to 1.
      remat: as for `Llama.__call__`.
    """
    hidden = model.hidden(frames, mask, remat)
    logits = model.backbone_logits(hidden[:, :-1])  # [B, T - 1, V]
    entropy = cross_entropy(logits, frames[:, 1:, 0])
    chosen, counts = choose_frames(targets, depth_share, keys)  # [B, K]
    by_codebook = _depth_entropy(model, hidden, frames, chosen, remat)  # [B, K, Q - 1]
    return Sums(
        backbone=jnp.sum(jnp.where(targets[:, 1:], entropy, 0)),
        depth=jnp.sum(jnp.where(counts[..., None], by_codebook, 0), axis=(0, 1)),
        num_frames=jnp.sum(targets, dtype=jnp.int32),
        num_depth_frames=jnp.sum(counts, dtype=jnp.int32),
    )


def cross_entropy(logits: Array, codes: Array) -> Array:
    """Float32 [...] of float32 logits [..., V] and int32 codes [...]."""
    said = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - said


def choose_frames(targets: Array, share: float, keys: Array) -> tuple[Array, Array]:
    """A random share of the targets of each row, rounded up.

    Row by row, so that what is chosen does not depend on how a batch is cut into pieces.

    Args:
      targets: bool [B, T].
      keys: [B].

    Returns:
      Positions, int32 [B, K]; and bool [B, K], which of them count.
    """
    length = targets.shape[1]
    scores = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    _, chosen = jax.lax.top_k(jnp.where(targets, scores, -1), num_chosen(length, share))
    wanted = num_depth_frames(targets, share)  # [B]
    return chosen, jnp.arange(chosen.shape[1])[None] < wanted[:, None]


def num_chosen(length: int, share: float) -> int:
    """Frames to make room for in rows of `length`."""
    return max(1, math.ceil(share * length))


def num_depth_frames(targets: Array, share: float) -> Array:
    """How many frames of each row the depth decoder sees, int32 [...] of targets [..., T]."""
    count = jnp.sum(targets, axis=-1, dtype=jnp.int32)
    # Float32 knows no sixteenth of 16 that is a little more than 1; a tenth of 10 it does.
    return jnp.ceil(count.astype(jnp.float32) * share - 1e-4).astype(jnp.int32)


def _depth_entropy(model: CSM, hidden: Array, frames: Array, chosen: Array, remat: bool) -> Array:
    """Float32 [B, K, Q - 1] of the frames at positions `chosen` [B, K]."""
    # Where there are too few targets, any position serves: it does not count.
    before = jnp.maximum(chosen - 1, 0)
    states = jnp.take_along_axis(hidden, before[..., None], axis=1)  # [B, K, D]
    codes = jnp.take_along_axis(frames[..., :-1], chosen[..., None], axis=1)  # [B, K, Q]
    rows = codes.reshape(-1, codes.shape[-1])
    logits = model.depth_logits(states.reshape(len(rows), -1), rows, remat)
    return cross_entropy(logits, rows[:, 1:]).reshape(*chosen.shape, -1)
