"""How many requests and open streams the server works on at once, in total and for each share."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from types import TracebackType

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import RETRY_AFTER, ApiError


class Permit:
    """Permission to work on one request, released when its block or its response ends."""

    def __init__(self, limiter: "RequestLimiter", caller: Caller):
        self.caller = caller
        self._limiter = limiter
        self._is_kept = False
        self._is_released = False

    def __enter__(self) -> "Permit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None or not self._is_kept:
            self.release()

    def keep(self) -> None:
        """Leaves the release to a response that is sent after the block."""
        self._is_kept = True

    def release(self) -> None:
        """Returns the permit to the limiter; a second call changes nothing."""
        if not self._is_released:
            self._is_released = True
            self._limiter.release(self.caller.share)


class RequestLimiter:
    """Limits the requests in progress. To be used from one event loop.

    One caller alone can have `most` permits. While other callers have some, it gets no more than
    its share of them by weight once few are left. As many permits again are for callers that have
    less than their share, because permits in use cannot be taken back.
    """

    def __init__(self, most: int):
        self._most = most
        # Free permits that a caller with more than its share leaves to others.
        self._left_free = max(1, most // 8)
        self._acquired: Counter[str] = Counter()
        self._weights: dict[str, float] = {}
        self._waiting: list[asyncio.Event] = []

    @property
    def total(self) -> int:
        """The number of permits, acquired or not."""
        return 2 * self._most

    @property
    def num_acquired(self) -> int:
        return self._acquired.total()

    async def acquire(self, caller: Caller, wait: bool = False) -> Permit:
        """Acquires a permit.

        Args:
          wait: waits until there is a permit for this caller, instead of raising an error.

        Raises:
          ApiError: there is none (429).
        """
        while not self._has_room(caller):
            if not wait:
                message = (
                    f"{self._acquired[caller.share]} of your requests are in progress, "
                    f"{self.num_acquired} of all, and no more are accepted: try again later"
                )
                raise ApiError(429, message, code="queue_full", retry_after=RETRY_AFTER)
            await self._wait()
        self._acquired[caller.share] += 1
        self._weights[caller.share] = caller.weight
        return Permit(self, caller)

    def release(self, share: str) -> None:
        """Takes back a permit of the share."""
        self._acquired[share] -= 1
        if not self._acquired[share]:
            del self._acquired[share], self._weights[share]
        for event in self._waiting:
            event.set()

    def _has_room(self, caller: Caller) -> bool:
        weights = self._weights | {caller.share: caller.weight}
        part = self._most * caller.weight / sum(weights.values())
        if self._acquired[caller.share] < max(1.0, part):
            return self.num_acquired < self.total
        others = len(weights) > 1
        return self.num_acquired < self._most - (self._left_free if others else 0)

    async def _wait(self) -> None:
        event = asyncio.Event()
        self._waiting.append(event)
        try:
            await event.wait()
        finally:
            self._waiting.remove(event)


class StreamLimiter:
    """Limits the open WebSockets, or event streams, of each caller. For one event loop."""

    def __init__(self, most: int, kind: str = "WebSockets"):
        """Starts with none open.

        Args:
          most: of one caller.
          kind: names the streams in messages.
        """
        self._most = most
        self._kind = kind
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def opened(self, caller: Caller) -> Iterator[None]:
        """Counts one more open stream during a block. Raises `ApiError` if there are too many."""
        if self._open[caller.share] >= self._most:
            message = f"{self._most} {self._kind} of yours are open, which is the limit: close one"
            raise ApiError(429, message, code="too_many_sockets", retry_after=RETRY_AFTER)
        self._open[caller.share] += 1
        try:
            yield
        finally:
            self._open[caller.share] -= 1
            if not self._open[caller.share]:
                del self._open[caller.share]
