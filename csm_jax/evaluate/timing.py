"""The times of a stream: whether its chunks came before they were needed."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Chunk(NamedTuple):
    """A chunk of a stream.

    Attributes:
      arrival: seconds since the request was submitted.
      duration: seconds of its audio.
    """

    arrival: float
    duration: float


class StreamClock:
    """Notes when the chunks of a request arrive; a listener of its ticket.

    Attributes:
      chunks: those so far.
    """

    def __init__(self, sample_rate: int, now: Callable[[], float] = time.perf_counter):
        """Starts the clock: to be made right before the request is submitted."""
        self._sample_rate = sample_rate
        self._now = now
        self._start = now()
        self.chunks: list[Chunk] = []
        self._seconds = 0.0
        self._over = threading.Event()

    def __call__(self, samples: np.ndarray | None) -> None:
        """Notes a chunk, float32 [n], or the end."""
        elapsed = self._now() - self._start
        if samples is None:
            self._seconds = elapsed
            self._over.set()
        else:
            self.chunks.append(Chunk(elapsed, len(samples) / self._sample_rate))

    def wait(self) -> float:
        """Waits for the end; the seconds from the submission to it."""
        self._over.wait()
        return self._seconds


def count_in_time(chunks: Sequence[Chunk]) -> int:
    """How many chunks after the first were there when the earlier ones had been played.

    A player starts with the first chunk. When it has to wait for a chunk, the following ones are
    needed so much later.
    """
    if not chunks:
        return 0
    played, in_time = sum(chunks[0]), 0
    for arrival, duration in chunks[1:]:
        in_time += arrival <= played
        played = max(played, arrival) + duration
    return in_time
