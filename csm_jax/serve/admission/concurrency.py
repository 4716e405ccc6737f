"""Places for requests in progress: taken before anything costly, bounded in all and per share."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from types import TracebackType

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import RETRY_AFTER, ApiError


class Place:
    """Leave to have one request worked on, given back when its block or its response ends."""

    def __init__(self, places: "Places", caller: Caller):
        self.caller = caller
        self._places = places
        self._is_kept = False
        self._is_released = False

    def __enter__(self) -> "Place":
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
        """Gives the place back; nothing happens the second time."""
        if not self._is_released:
            self._is_released = True
            self._places.release(self.caller.share)


class Places:
    """The places of all callers. To be used from one event loop.

    One caller alone can have `most` places. Beside others it gets no more than its share of them
    by weight once few are left. As many places again are for callers that have less than their
    share: what others hold already cannot be taken from them.
    """

    def __init__(self, most: int):
        self._most = most
        # Free places that a caller with more than its share leaves to others.
        self._left_free = max(1, most // 8)
        self._held: Counter[str] = Counter()
        self._weights: dict[str, float] = {}
        self._waiting: list[asyncio.Event] = []

    @property
    def total(self) -> int:
        """Places there are."""
        return 2 * self._most

    @property
    def num_held(self) -> int:
        return self._held.total()

    async def take(self, caller: Caller, wait: bool = False) -> Place:
        """Raises `ApiError` (429) if there is no place for this caller, unless it is to wait."""
        while not self._has_room(caller):
            if not wait:
                message = (
                    f"{self._held[caller.share]} of your requests are in progress, "
                    f"{self.num_held} of all, and no place is free: try again later"
                )
                raise ApiError(429, message, code="queue_full", retry_after=RETRY_AFTER)
            await self._wait()
        self._held[caller.share] += 1
        self._weights[caller.share] = caller.weight
        return Place(self, caller)

    def release(self, share: str) -> None:
        """A request of the share is over."""
        self._held[share] -= 1
        if not self._held[share]:
            del self._held[share], self._weights[share]
        for event in self._waiting:
            event.set()

    def _has_room(self, caller: Caller) -> bool:
        weights = self._weights | {caller.share: caller.weight}
        part = self._most * caller.weight / sum(weights.values())
        if self._held[caller.share] < max(1.0, part):
            return self.num_held < self.total
        others = len(weights) > 1
        return self.num_held < self._most - (self._left_free if others else 0)

    async def _wait(self) -> None:
        event = asyncio.Event()
        self._waiting.append(event)
        try:
            await event.wait()
        finally:
            self._waiting.remove(event)


class Sockets:
    """The WebSockets, or streams of events, that callers have open. For one event loop."""

    def __init__(self, most: int, what: str = "WebSockets"):
        """Starts with none open.

        Args:
          most: of one caller.
          what: the things that are counted, for messages.
        """
        self._most = most
        self._what = what
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def opened(self, caller: Caller) -> Iterator[None]:
        """A block in which one more is open. Raises `ApiError` if there are too many."""
        if self._open[caller.share] >= self._most:
            message = f"{self._most} {self._what} of yours are open, and no more may be: close one"
            raise ApiError(429, message, code="too_many_sockets", retry_after=RETRY_AFTER)
        self._open[caller.share] += 1
        try:
            yield
        finally:
            self._open[caller.share] -= 1
            if not self._open[caller.share]:
                del self._open[caller.share]
