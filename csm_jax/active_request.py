"""Requests in an `Engine`, and when their frames are generated and decoded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.decode_batch import Utterance
from csm_jax.decode_step import CHUNK_FRAMES
from csm_jax.mimi.conv import State
from csm_jax.pacing import LONG_CHUNK, Pace
from csm_jax.request_state import RequestState
from csm_jax.ticket import Ticket

# Requests join and leave at borders only: unless a frame takes longer, they are no further apart.
MAX_STEP_SECONDS = 0.25


@dataclass(eq=False)
class ActiveRequest:
    """A request that has, or waits for, a row of the batch.

    Attributes:
      pace: None if no chunks are wanted before the end.
      next: the utterance whose prompt is to be prefilled next; None while one is spoken, and in
        the end.
      undecoded: int32 [n, Q], frames that a listener has not got yet.
      since: when it began to wait.
      share, weight, in_background: as `scheduler.Shared` has them.
      stream: state of the codec, while a request that has begun waits for a row.
    """

    ticket: Ticket
    speech: RequestState
    pace: Pace | None
    next: Utterance | None
    undecoded: np.ndarray
    since: float
    share: str
    weight: float
    in_background: bool
    stream: State | None = None
    is_finished: bool = False

    def take(self, num_frames: int) -> np.ndarray:
        """The first of the frames that are not decoded, [num_frames, Q]."""
        taken, self.undecoded = np.split(self.undecoded, [num_frames])
        return taken


def frames_to_border(slots: Sequence[ActiveRequest], frame_seconds: float) -> int:
    """Frames that these rows generate before requests may join or leave again."""
    wanted = min((slot.pace.next_chunk() for slot in slots if slot.pace), default=CHUNK_FRAMES)
    return max(1, min(wanted, int(MAX_STEP_SECONDS / frame_seconds)))


def next_blocks(slots: Sequence[ActiveRequest | None]) -> dict[int, np.ndarray]:
    """Frames [F, Q] to decode now, of the rows that have as many; empty when the rest waits."""
    due = {
        index: slot
        for index, slot in enumerate(slots)
        if slot and len(slot.undecoded) and not _is_better_decoded_later(slot)
    }
    longest = max((len(slot.undecoded) for slot in due.values()), default=0)
    size = LONG_CHUNK if longest >= LONG_CHUNK else 1
    return {i: slot.take(size) for i, slot in due.items() if len(slot.undecoded) >= size}


def _is_better_decoded_later(slot: ActiveRequest) -> bool:
    """Whether frames wait for more of them: the listener has enough to play, and the codec takes
    hardly longer for a long chunk than for a frame."""
    missing = LONG_CHUNK - len(slot.undecoded)
    is_running = not slot.is_finished and not slot.next
    return missing > 0 and is_running and slot.pace is not None and slot.pace.can_wait(missing)
