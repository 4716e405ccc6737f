"""Fair shares: which of the items that wait is served next.

Nothing here runs anything, so the same rules serve the rows of a batch and the threads of a pool.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

# Weights are taken for at most this and at least its inverse: nobody waits for ever.
MAX_WEIGHT = 100.0


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

    def __iter__(self):
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
        """Whether an item waits of a share with fewer running items per weight than this one."""
        own = self._shares[name].load
        return any(share.items and share.load < own for share in self._shares.values())

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
