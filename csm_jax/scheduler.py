"""Fair shares: which of the items that wait is served next.

Nothing here runs anything, so the same rules serve the rows of a batch and the threads of a pool.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

# Weights are taken for at most this and at least its inverse, so that no share waits for ever.
MAX_WEIGHT = 1000.0
# After the last request of another share, a row is kept for others so long.
COMPANY_SECONDS = 60.0


@dataclass
class _Share(Generic[T]):
    """What one share has waiting and running.

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
    """Items that wait, first in, first out within a share.

    The share with the fewest running items per weight goes first. Among equals they take turns:
    of every `total` items served while shares of that total weight wait, one of weight w gets
    w / total. A share that has just come has its turn now.
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
        """Adds an item that goes first of its share, such as one that made room for others."""
        self._open(name, weight).items.appendleft(item)

    def pop(self, idle_only: bool = False) -> T | None:
        """Takes the next item, which runs from now on until `finish`; None if there is none.

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
        """One item of a share runs no longer."""
        self._shares[name].num_running -= 1
        self._forget()

    def remove(self, item: T) -> None:
        """Takes out an item that waits; raises `ValueError` if it does not."""
        for share in self._shares.values():
            if item in share.items:
                share.items.remove(item)
                self._forget()
                return
        raise ValueError("the item does not wait here")

    def clear(self) -> None:
        """Forgets all items that wait."""
        for share in self._shares.values():
            share.items.clear()
        self._forget()

    def should_yield(self, name: str) -> bool:
        """Whether another share goes before a running item of this one, were that to wait again."""
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

    def _forget(self) -> None:
        """Shares that have nothing here, and whose turn has come, are as good as new."""
        self._shares = {
            name: share
            for name, share in self._shares.items()
            if share.items or share.num_running or share.due > self._clock
        }


class Shared(Protocol):
    """A request for a row of a batch.

    Attributes:
      share, weight: whose rows are counted together, and how many of them compared with others.
      in_background: whether all other requests go first.
    """

    share: str
    weight: float
    in_background: bool


class Company:
    """Whether requests of more than one share have come lately."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._last: str | None = None
        self._last_time = self._other_time = float("-inf")

    def came(self, share: str) -> None:
        """Notes a request of a share."""
        if share != self._last:
            self._other_time = self._last_time
        self._last, self._last_time = share, self._clock()

    def __bool__(self) -> bool:
        return self._clock() - self._other_time < COMPANY_SECONDS


R = TypeVar("R", bound=Shared)


class RowScheduler(Generic[R]):
    """The requests that wait for a row of a batch, and which one gets the next row.

    Attributes:
      live, background: the requests that wait.
    """

    def __init__(
        self,
        num_rows: int,
        kept_rows: int = 0,
        kept_beside_others: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts with nothing waiting.

        Args:
          kept_rows: rows that only shares without a row get. One row of several is kept from
            requests in the background in any case.
          kept_beside_others: the same while several shares ask, in seconds of `clock`.
        """
        self._num_rows = num_rows
        self._kept_rows = min(kept_rows, num_rows - 1)
        self._kept_beside_others = min(max(kept_rows, kept_beside_others), num_rows - 1)
        self._company = Company(clock)
        self._kept_from_background = max(self._kept_rows, min(1, num_rows - 1))
        self.live: FairQueue[R] = FairQueue()
        self.background: FairQueue[R] = FairQueue()

    def __iter__(self) -> Iterator[R]:
        yield from self.live
        yield from self.background

    def queue(self, in_background: bool) -> FairQueue[R]:
        return self.background if in_background else self.live

    def pop(self) -> R | None:
        """The request that gets a row now; None if no row is free or nothing may have it."""
        num_free = self._num_rows - self.live.num_running - self.background.num_running
        if num_free < 1:
            return None
        kept = self._kept_beside_others if self._company else self._kept_rows
        request = self.live.pop(idle_only=num_free <= kept)
        if request is None and num_free > self._kept_from_background:
            request = self.background.pop()
        return request

    def should_yield(self, request: R) -> bool:
        """Whether another request should have the row of this one."""
        if request.in_background and len(self.live):
            return True
        return self.queue(request.in_background).should_yield(request.share)

    def push(self, request: R) -> None:
        # Requests without a share, such as those that warm a server up, are no company.
        if request.share and not request.in_background:
            self._company.came(request.share)
        self.queue(request.in_background).push(request, request.share, request.weight)

    def push_front(self, request: R) -> None:
        """Adds a request that has given its row back and goes first of its share."""
        self.queue(request.in_background).push_front(request, request.share, request.weight)

    def finish(self, request: R) -> None:
        """A request has its row no longer."""
        self.queue(request.in_background).finish(request.share)

    def remove(self, request: R) -> None:
        self.queue(request.in_background).remove(request)

    def clear(self) -> None:
        self.live.clear()
        self.background.clear()
