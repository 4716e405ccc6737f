"""Limits for the memory that requests, messages and responses take, in total and per share."""

from collections import Counter

from csm_jax.serve.errors import RETRY_AFTER, ApiError

# The part of the total that one share may take.
_SHARE_FRACTION = 0.5


class MemoryBudget:
    """Counts bytes of request bodies, messages or responses in memory, in total and per share.

    One share may take half of the total.
    """

    def __init__(self, limit: int, kind: str, action: str = "read"):
        """Starts with nothing in memory.

        Args:
          limit: bytes of all shares together.
          kind: names what is counted in messages.
          action: says in messages what is being done with it.
        """
        self._limit = limit
        self._kind = kind
        self._action = action
        self._total = 0
        self._shares: Counter[str] = Counter()

    def check(self, share: str, num_bytes: int) -> None:
        """Raises `ApiError` if there is no room for so many more."""
        if self._total + num_bytes > self._limit:
            message = f"too many {self._kind} are being {self._action} at the moment"
            raise ApiError(503, message, code="busy", retry_after=RETRY_AFTER)
        if self._shares[share] + num_bytes > _SHARE_FRACTION * self._limit:
            message = f"too many of your {self._kind} are being {self._action}"
            raise ApiError(429, message, code="busy", retry_after=RETRY_AFTER)

    def add(self, share: str, num_bytes: int) -> None:
        """Adds bytes to the count, or subtracts them if the number is negative."""
        self._total += num_bytes
        self._shares[share] += num_bytes
        if self._shares[share] <= 0:
            del self._shares[share]
