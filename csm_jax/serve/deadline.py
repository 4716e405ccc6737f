"""The deadline for the work that remains when a server is stopped."""

import time


class Deadline:
    """A time limit that starts when the server is stopped."""

    def __init__(self, seconds: float):
        """Does not start yet.

        Args:
          seconds: from `start` until the deadline.
        """
        self.seconds = seconds
        self._at: float | None = None

    @property
    def is_started(self) -> bool:
        return self._at is not None

    def left_before(self, reserve: float) -> float:
        """Seconds left until the last part of the time, `reserve` as a fraction of the whole."""
        return max(0.0, self.left - reserve * self.seconds)

    @property
    def left(self) -> float:
        """Seconds left, at least 0; all of them before the start."""
        return self.seconds if self._at is None else max(0.0, self._at - time.monotonic())

    def start(self) -> None:
        """Starts the time; a second call changes nothing."""
        if self._at is None:
            self._at = time.monotonic() + self.seconds
