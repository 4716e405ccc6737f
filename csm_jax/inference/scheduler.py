"""Fair scheduling: which of the waiting items is served next.

Nothing here runs anything, so the same rules serve the slots of a batch and the threads of a pool.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

# Weights are limited to this and to its inverse, so that no share waits forever.
MAX_WEIGHT = 1000.0
# How long after the last request of another share slots are kept for other shares.
OTHERS_SECONDS = 60.0


@dataclass
class _Share(Generic[T]):
    """The waiting and running items of one share.

    Attributes:
      due: when its turn comes, on the clock of the queue, which ticks with every item served.
      served: when it had its last turn.
    """

    weight: float = 1.0
    items: deque[T] = field(default_factory=deque)
    num_running: int = 0
    due: float = 0.0
    served: float = -1.0

    @property
    def load(self) -> float:
        return self.num_running / self.weight


class FairQueue(Generic[T]):
    """Waiting items, first in, first out within a share.

    The share with the fewest running items per weight goes first. Among equals they take turns:
    of every `total` items served while shares of that total weight wait, one of weight w gets
    w / total. A new share has its turn now.
    """

    def __init__(self):
        self._shares: dict[str, _Share[T]] = {}
        self._clock = 0.0

    def __len__(self) -> int:
        return sum(len(share.items) for share in self._shares.values())

    def __iter__(self) -> Iterator[T]:
        for share in self._shares.values():
            yield from share.items

    @property
    def num_running(self) -> int:
        """Items that were handed out and are not finished."""
        return sum(share.num_running for share in self._shares.values())

    def push(self, item: T, name: str = "", weight: float = 1.0) -> None:
        """Adds an item at the end of its share's queue."""
        self._open(name, weight).items.append(item)

    def push_front(self, item: T, name: str = "", weight: float = 1.0) -> None:
        """Adds an item that goes first in its share, such as one that has yielded to others."""
        self._open(name, weight).items.appendleft(item)

    def pop(self, idle_only: bool = False) -> T | None:
        """Takes the next item, which counts as running until `finish`; None if there is none.

        Args:
          idle_only: only of shares that have nothing running.
        """
        ready = [
            share
            for share in self._shares.values()
            if share.items and not (idle_only and share.num_running)
        ]
        if not ready:
            return None
        share = min(ready, key=lambda share: (share.load, share.due, share.served))
        total = sum(each.weight for each in self._shares.values() if each.items)
        # Late turns are made up for, but never more than one.
        share.due = max(share.due, self._clock - 1) + total / share.weight
        share.served = self._clock
        share.num_running += 1
        self._clock += 1
        return share.items.popleft()

    def finish(self, name: str = "") -> None:
        """Notes that an item of a share is no longer running."""
        self._shares[name].num_running -= 1
        self._drop_idle()

    def remove(self, item: T) -> None:
        """Removes a waiting item. Raises `ValueError` if it is not waiting here."""
        for share in self._shares.values():
            if item in share.items:
                share.items.remove(item)
                self._drop_idle()
                return
        raise ValueError("the item is not waiting here")

    def clear(self) -> None:
        """Drops all waiting items."""
        for share in self._shares.values():
            share.items.clear()
        self._drop_idle()

    def should_yield(self, name: str) -> bool:
        """Whether another share would go before a running item of this one if that waited."""
        own = self._shares[name]
        key = (own.num_running - 1) / own.weight, max(own.due, self._clock)
        return any(
            share is not own and share.items and (share.load, share.due) <= key
            for share in self._shares.values()
        )

    def _open(self, name: str, weight: float) -> _Share[T]:
        share = self._shares.setdefault(name, _Share(due=self._clock))
        share.weight = min(max(weight, 1 / MAX_WEIGHT), MAX_WEIGHT)
        if not share.items:
            share.due = max(share.due, self._clock)
        return share

    def _drop_idle(self) -> None:
        """Drops shares without items whose turn has come: they are as good as new ones."""
        self._shares = {
            name: share
            for name, share in self._shares.items()
            if share.items or share.num_running or share.due > self._clock
        }


class Shared(Protocol):
    """A request for a slot of a batch.

    Attributes:
      share, weight: the share that its slot counts for, and how many slots that share gets compared
        with others.
      in_background: whether all other requests go first.
    """

    share: str
    weight: float
    in_background: bool


class RecentShares:
    """Whether requests of more than one share have arrived lately; true or false as a `bool`."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._last: str | None = None
        self._last_time = self._other_time = float("-inf")

    def note(self, share: str) -> None:
        """Notes a request of a share."""
        if share != self._last:
            self._other_time = self._last_time
        self._last, self._last_time = share, self._clock()

    def __bool__(self) -> bool:
        return self._clock() - self._other_time < OTHERS_SECONDS


R = TypeVar("R", bound=Shared)


class SlotScheduler(Generic[R]):
    """The requests that wait for a slot of a batch, and which one gets the next slot.

    Attributes:
      live, background: the waiting requests.
    """

    def __init__(
        self,
        num_slots: int,
        kept_rows: int = 0,
        kept_beside_others: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts with nothing waiting.

        Args:
          num_slots: slots of the batch.
          kept_rows: slots that only shares without a slot get. One slot of several is kept from
            requests in the background in any case.
          kept_beside_others: the same, while several shares ask for slots.
          clock: returns seconds.
        """
        self._num_slots = num_slots
        self._kept_rows = min(kept_rows, num_slots - 1)
        self._kept_beside_others = min(max(kept_rows, kept_beside_others), num_slots - 1)
        self._recent = RecentShares(clock)
        self._kept_from_background = max(self._kept_rows, min(1, num_slots - 1))
        self.live: FairQueue[R] = FairQueue()
        self.background: FairQueue[R] = FairQueue()

    def __iter__(self) -> Iterator[R]:
        yield from self.live
        yield from self.background

    def queue(self, in_background: bool) -> FairQueue[R]:
        """The queue of a kind of requests."""
        return self.background if in_background else self.live

    def pop(self) -> R | None:
        """The request that gets a slot now; None if no slot is free for any of them."""
        num_free = self._num_slots - self.live.num_running - self.background.num_running
        if num_free < 1:
            return None
        kept = self._kept_beside_others if self._recent else self._kept_rows
        request = self.live.pop(idle_only=num_free <= kept)
        if request is None and num_free > self._kept_from_background:
            request = self.background.pop()
        return request

    def should_yield(self, request: R) -> bool:
        """Whether another request should have the slot of this one."""
        if request.in_background and len(self.live):
            return True
        return self.queue(request.in_background).should_yield(request.share)

    def push(self, request: R) -> None:
        """Adds a request at the end of its share's queue."""
        # Requests without a share, such as those that warm a server up, do not count.
        if request.share and not request.in_background:
            self._recent.note(request.share)
        self.queue(request.in_background).push(request, request.share, request.weight)

    def push_front(self, request: R) -> None:
        """Adds a request that has yielded its slot and goes first in its share."""
        self.queue(request.in_background).push_front(request, request.share, request.weight)

    def finish(self, request: R) -> None:
        """Notes that a request has its slot no longer."""
        self.queue(request.in_background).finish(request.share)

    def remove(self, request: R) -> None:
        """Removes a waiting request. Raises `ValueError` if it is not waiting here."""
        self.queue(request.in_background).remove(request)

    def clear(self) -> None:
        """Drops all waiting requests."""
        self.live.clear()
        self.background.clear()
