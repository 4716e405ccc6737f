"""How much of what callers send, and are sent, is held in memory."""

from collections import Counter

from csm_jax.serve.errors import RETRY_AFTER, ApiError

# What one caller may hold of all that is held.
_SHARE = 0.5


class Held:
    """Counts bytes of request bodies, messages or responses in memory: of all callers and of each.

    One caller may hold half of what all may.
    """

    def __init__(self, limit: int, what: str, done: str = "read"):
        """Starts with nothing held.

        Args:
          limit: bytes of all callers together.
          what: the things that are counted, for messages.
          done: what is being done with them, for messages.
        """
        self._limit = limit
        self._what = what
        self._done = done
        self._total = 0
        self._shares: Counter[str] = Counter()

    def check(self, share: str, num_bytes: int) -> None:
        """Raises `ApiError` if there is no room for so many more."""
        if self._total + num_bytes > self._limit:
            message = f"too many {self._what} are being {self._done} at the moment"
            raise ApiError(503, message, code="busy", retry_after=RETRY_AFTER)
        if self._shares[share] + num_bytes > _SHARE * self._limit:
            message = f"too many of your {self._what} are being {self._done}"
            raise ApiError(429, message, code="busy", retry_after=RETRY_AFTER)

    def add(self, share: str, num_bytes: int) -> None:
        """Counts bytes that are held from now on; with a negative number, that no longer are."""
        self._total += num_bytes
        self._shares[share] += num_bytes
        if self._shares[share] <= 0:
            del self._shares[share]
