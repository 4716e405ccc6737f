"""Interventions of all rows of a batch, as arrays, and what they are at one frame of each row.

Nothing of them needs the host between two frames: what differs from frame to frame is an array with
an axis of frames, so it also holds after a rewind.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from csm_jax.model.changes import FrameChanges, Guidance, ReplacedHeads, StackChanges
from csm_jax.model.layers import AnyArray, Array
from csm_jax.model.logits_functions import NO_CALLS, NO_ROWS, CallRows, Calls, FrameFunctions


class ForcedCodes(NamedTuple):
    """Codes that are given, not drawn, in the first frames of each row.

    Attributes:
      codes: int32 [B, R, Q]; -1 is drawn.
      num_frames: int32 [B], of `codes`; speech does not end before them by itself.
    """

    codes: AnyArray
    num_frames: AnyArray


class RowGuidance(NamedTuple):
    """Classifier-free guidance of rows that have two prompts.

    Attributes:
      scale: float32 [B, R], by frame; the last one goes on.
      is_on: bool [B].
      depth_decoder: bool [B], the rows whose codebooks 1 and up are guided too; None if there are
        none.
    """

    scale: AnyArray
    is_on: AnyArray
    depth_decoder: AnyArray | None


class SteeredLayer(NamedTuple):
    """Vectors that are added to what a layer passes on.

    Attributes:
      vectors: float32 [B, K, D].
      strengths: float32 [B, R, K], by frame; the last ones go on.
    """

    vectors: AnyArray
    strengths: AnyArray

    def at(self, frame: Array) -> Array:
        """The sum of the vectors, [B, D]."""
        # No matrix product, whose precision depends on the platform.
        return jnp.sum(_at(self.strengths, frame)[:, :, None] * self.vectors, axis=1)


class StackInterventions(NamedTuple):
    """What is changed inside a stack, by layer; no layer leaves the program without it.

    Attributes:
      steering: by layer, counted from 1.
      heads: by layer, counted from 0.
    """

    steering: Mapping[int, SteeredLayer]
    heads: Mapping[int, ReplacedHeads]

    def at(self, frame: Array) -> StackChanges:
        """What is changed in frame number `frame` [B] of each row."""
        return StackChanges(
            {layer: steered.at(frame) for layer, steered in self.steering.items()}, self.heads
        )


NO_STACK_INTERVENTIONS = StackInterventions({}, {})


class RowInterventions(NamedTuple):
    """What is changed in the frames of all rows; None leaves the program without it.

    Attributes:
      forced: codes that are given.
      backbone, depth_decoder: what is changed inside of them.
      guidance: if there is any, the cache has two rows for each of the batch: row B + b has the
        second prompt of row b.
      functions: the rows that functions of logits are applied to.
    """

    forced: ForcedCodes | None = None
    backbone: StackInterventions = NO_STACK_INTERVENTIONS
    depth_decoder: StackInterventions = NO_STACK_INTERVENTIONS
    guidance: RowGuidance | None = None
    functions: CallRows = NO_ROWS

    def at(self, frame: Array, end_bias: Array | None) -> FrameChanges:
        """What is changed after the backbone, in frame number `frame` [B] of each row.

        Args:
          end_bias: float32 [B, Q], of the end of speech; codes that are forced add to it.
        """
        changes = FrameChanges(end_bias, depth_decoder=self.depth_decoder.at(frame))
        if self.forced is not None:
            changes = changes._replace(
                forced=_forced_codes(self.forced, frame),
                end_bias=_without_end(end_bias, self.forced, frame),
            )
        if self.guidance is not None:
            scale, which = _at(self.guidance.scale, frame), self.guidance.depth_decoder
            changes = changes._replace(
                guidance=Guidance(scale, self.guidance.is_on),
                depth_guidance=None if which is None else Guidance(scale, which),
            )
        return changes

    def functions_at(self, frame: Array, fed: Array, calls: Calls) -> FrameFunctions | None:
        """The functions in frame number `frame` [B] of each row; None without any.

        Args:
          fed: int32 [B, Q + 1] or [2 * B, Q + 1], the rows that were fed last.
        """
        if calls == NO_CALLS:
            return None
        previous = jnp.where((frame == 0)[:, None], -1, fed[: len(frame), :-1])
        return FrameFunctions(calls, self.functions, frame, previous)


NO_INTERVENTIONS = RowInterventions()


def _at(values: AnyArray, frame: Array) -> Array:
    """The entry of each row's frame [B] of [B, R, ...]; after the last one, that one."""
    index = jnp.minimum(frame, values.shape[1] - 1)
    index = jax.lax.expand_dims(index, range(1, values.ndim))
    return jnp.take_along_axis(jnp.asarray(values), index, axis=1)[:, 0]


def _forced_codes(forced: ForcedCodes, frame: Array) -> Array:
    """int32 [B, Q], of each row's frame."""
    is_forced = frame < forced.num_frames
    return jnp.where(is_forced[:, None], _at(forced.codes, frame), -1)


def _without_end(end_bias: Array | None, forced: ForcedCodes, frame: Array) -> Array:
    """The bias [B, Q] with which rows do not end before the last of their forced codes."""
    is_before_end, num_codebooks = frame < forced.num_frames, forced.codes.shape[-1]
    # A frame is the end by its last code alone: frames that only begin with zeros stay as likely.
    is_last = jnp.arange(num_codebooks, dtype=jnp.int32) == num_codebooks - 1
    bias = jnp.where(is_before_end[:, None] & is_last[None], -jnp.inf, 0).astype(jnp.float32)
    return bias if end_bias is None else end_bias + bias
