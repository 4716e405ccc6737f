"""A request inside an `Engine`, and when its frames are generated and decoded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from csm_jax.inference.decode_step import CHUNK_FRAMES
from csm_jax.inference.frame_blocks import FrameBlocks
from csm_jax.inference.pacing import Pace
from csm_jax.inference.request_state import RequestState
from csm_jax.inference.ticket import Ticket
from csm_jax.inference.utterance import Utterance
from csm_jax.mimi.conv import State


@dataclass(eq=False)
class ActiveRequest:
    """A request that has a slot of the batch, or waits for one.

    Attributes:
      ticket: the caller's side of it.
      state: which utterances are left, and which of their frames count.
      pace: None if no chunks are wanted before the end.
      next: the utterance to prefill next; None while one is running, and after the last.
      blocks: frames whose audio the caller has not got yet; empty if no chunks are wanted.
      since: when it began to wait, by `time.perf_counter`.
      share, weight, in_background: as in `scheduler.Shared`.
      codec_state: of its stream, while a request that has started waits for a slot.
      is_finished: whether all its frames have been generated.
    """

    ticket: Ticket
    state: RequestState
    pace: Pace | None
    next: Utterance | None
    blocks: FrameBlocks
    since: float
    share: str
    weight: float
    in_background: bool
    codec_state: State | None = None
    is_finished: bool = False

    @property
    def is_running(self) -> bool:
        """Whether frames of it are being generated: it is neither to be prefilled nor finished."""
        return not self.is_finished and self.next is None


def next_num_frames(
    requests: Iterable[ActiveRequest], frame_seconds: float, max_step_seconds: float
) -> int:
    """Frames of the next step, after which requests can join and leave.

    Args:
      frame_seconds: what a frame took lately.
      max_step_seconds: the longest that a step may take, unless a single frame takes longer.
    """
    wanted = min((each.pace.next_chunk() for each in requests if each.pace), default=CHUNK_FRAMES)
    return max(1, min(wanted, int(max_step_seconds / frame_seconds)))


def next_blocks(requests: Mapping[int, ActiveRequest]) -> dict[int, np.ndarray]:
    """Frames [F, Q] to decode now, by slot, with the same F for all; empty if nothing is due.

    The smallest blocks go first: they are those of streams that have just begun.
    """
    sizes = {i: each.blocks.next_size(not each.is_running) for i, each in requests.items()}
    size = min(filter(None, sizes.values()), default=0)
    return {i: requests[i].blocks.take(size) for i in sizes if size and sizes[i] == size}
