"""Pacing: how many frames a stream generates at a time to stay ahead of playback."""

import time

# Frames that are generated at once when there is time.
LONG_CHUNK = 8
# A long chunk is begun when there is this much more to play than it should take.
MARGIN = 1.5


class Pace:
    """Chooses how many frames to generate next, from how long the last ones took.

    The first chunk and a slow machine need one frame at a time; many at a time are cheaper.
    """

    def __init__(self, frame_s: float):
        """Starts before the first frame.

        Args:
          frame_s: seconds of audio in a frame.
        """
        self._frame_s = frame_s
        self._num_played = 0
        self._started: float | None = None

    def next_chunk(self) -> int:
        """Frames to generate now."""
        return LONG_CHUNK if self.can_wait(LONG_CHUNK) else 1

    def can_wait(self, num_frames: int) -> bool:
        """Whether there is enough audio to play while `num_frames` more are generated."""
        if self._started is None or self._num_played < 2:
            return False  # there is no interval to measure yet
        elapsed = time.perf_counter() - self._started
        lead = self._num_played * self._frame_s - elapsed
        # The first frame was there when the clock started.
        per_frame = elapsed / (self._num_played - 1)
        return lead > MARGIN * num_frames * per_frame

    def played(self, num_frames: int) -> None:
        """Notes that `num_frames` more frames have been handed over."""
        if self._started is None:
            self._started = time.perf_counter()
        self._num_played += num_frames

    def resume(self) -> None:
        """Notes that nothing was generated for a while, in which playback can have run out."""
        if self._started is not None:
            elapsed = time.perf_counter() - self._started
            self._started += max(0.0, elapsed - self._num_played * self._frame_s)
