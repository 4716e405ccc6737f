"""The loss: cross entropy of every code, given all codes before it.

Frame t is predicted from the backbone's state at row t - 1, its other codebooks by the depth
decoder from that state and the codebooks before. The frame of zeros that ends a turn is a frame
like the others. It is the loss of transformers' `CsmForConditionalGeneration(labels=...)`.

The depth decoder is trained on a random share of the frames only (compute amortization, as the
authors of CSM describe it): it would take more memory than the backbone, and a sixteenth of the
frames trains it as well.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from csm_jax.model.csm import CSM
from csm_jax.model.layers import AnyArray, Array
from csm_jax.model.llama import Head
from csm_jax.model.random_numbers import uniform_numbers
from csm_jax.model.teacher_forcing import frames_at
from csm_jax.train.batches import Batch
from csm_jax.train.guided_attention import guided_entropy, guided_frames


class LossSums(NamedTuple):
    """Summed losses and what to divide them by, so that parts of a batch can be added.

    Attributes:
      backbone: float32 [], summed over frames.
      depth: float32 [Q - 1], of codebooks 1 and up, summed over the chosen frames.
      num_frames: int32 [], frames of the loss mask.
      num_depth_frames: int32 [], those of them that the depth decoder is trained on.
      guided: float32 [], of guided attention, summed over guided frames; None without guided heads.
      num_guided: int32 [], guided frames; None without guided heads.
    """

    backbone: Array
    depth: Array
    num_frames: Array
    num_depth_frames: Array
    guided: Array | None = None
    num_guided: Array | None = None


def summed_losses(
    model: CSM,
    batch: Batch,
    keys: Array,
    *,
    depth_share: float,
    remat: bool = False,
    heads: Sequence[Head] = (),
) -> LossSums:
    """Teacher-forced losses of a batch.

    Args:
      batch: its loss mask never has the first position of a row.
      keys: PRNG keys [B], which choose the frames for the depth decoder.
      depth_share: share of the frames that the depth decoder is trained on, 0 to 1.
      remat: as for `Llama.__call__`.
      heads: whose attention is guided.
    """
    frames, loss_mask = batch.frames, batch.loss_mask
    hidden, observed = model.attend(frames, batch.mask, heads, remat=remat)
    logits = model.backbone_logits(hidden[:, :-1])  # [B, T - 1, V]
    entropy = cross_entropy(logits, frames[:, 1:, 0])
    chosen, counts = choose_frames(loss_mask, depth_share, keys)  # [B, K]
    by_codebook = _depth_entropy(model, hidden, frames, chosen, remat)  # [B, K, Q - 1]
    sums = LossSums(
        backbone=jnp.sum(jnp.where(loss_mask[:, 1:], entropy, 0)),
        depth=jnp.sum(jnp.where(counts[..., None], by_codebook, 0), axis=(0, 1)),
        num_frames=jnp.sum(loss_mask, dtype=jnp.int32),
        num_depth_frames=jnp.sum(counts, dtype=jnp.int32),
    )
    if batch.spoken is None or not heads:
        return sums
    return sums._replace(
        guided=guided_entropy(observed.attention, batch.spoken, loss_mask),
        num_guided=jnp.sum(guided_frames(batch.spoken, loss_mask), dtype=jnp.int32),
    )


def cross_entropy(logits: Array, codes: AnyArray) -> Array:
    """Float32 [...] of float32 logits [..., V] and int32 codes [...]."""
    chosen = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def choose_frames(loss_mask: AnyArray, share: float, keys: Array) -> tuple[Array, Array]:
    """Chooses a random share of the frames in the loss mask of each row, rounded up.

    It does so row by row, so that the choice does not depend on how a batch is divided.

    Args:
      loss_mask: bool [B, T].
      keys: [B].

    Returns:
      Positions, int32 [B, K]; and bool [B, K], those of them that count.
    """
    length = loss_mask.shape[1]
    scores = jax.vmap(lambda key: uniform_numbers(key, length))(keys)
    _, chosen = jax.lax.top_k(jnp.where(loss_mask, scores, -1), num_chosen(length, share))
    wanted = num_depth_frames(loss_mask, share)  # [B]
    return chosen, jnp.arange(chosen.shape[1])[None] < wanted[:, None]


def num_chosen(length: int, share: float) -> int:
    """The largest number of frames that may be chosen in rows of `length`."""
    return max(1, math.ceil(share * length))


def num_depth_frames(loss_mask: AnyArray, share: float) -> Array:
    """How many frames are chosen in each row, int32 [...], of a loss mask [..., T]."""
    count = jnp.sum(loss_mask, axis=-1, dtype=jnp.int32)
    # In float32, a tenth of 10 is a little more than 1, and would be rounded up.
    return jnp.ceil(count.astype(jnp.float32) * share - 1e-4).astype(jnp.int32)


def _depth_entropy(
    model: CSM, hidden: Array, frames: AnyArray, chosen: Array, remat: bool
) -> Array:
    """Float32 [B, K, Q - 1] of the frames at positions `chosen` [B, K]."""
    # Where the mask has fewer frames than K, any position will do: it does not count.
    states, codes = frames_at(hidden, frames, chosen)
    rows = codes.reshape(-1, codes.shape[-1])
    logits = model.depth_logits(states.reshape(len(rows), -1), rows, remat)
    return cross_entropy(logits, rows[:, 1:]).reshape(*chosen.shape, -1)
