"""The deadline for all work that is left when a server is stopped."""

import time


class Deadline:
    """A time limit that begins to run when the server is stopped."""

    def __init__(self, seconds: float):
        """Does not run yet.

        Args:
          seconds: from `start` until the deadline.
        """
        self.seconds = seconds
        self._at: float | None = None

    @property
    def is_started(self) -> bool:
        return self._at is not None

    def left_before(self, reserve: float) -> float:
        """Seconds left for what has to be over before the last part, `reserve` of the whole."""
        return max(0.0, self.left - reserve * self.seconds)

    @property
    def left(self) -> float:
        """Seconds left, at least 0; all of them before the start."""
        return self.seconds if self._at is None else max(0.0, self._at - time.monotonic())

    def start(self) -> None:
        """Lets the time run; nothing happens the second time."""
        if self._at is None:
            self._at = time.monotonic() + self.seconds
