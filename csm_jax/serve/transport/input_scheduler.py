"""Whose input is read next: the event loop is shared fairly between clients."""

import asyncio
import time
from collections import deque
from typing import Protocol

# Seconds of one round of the event loop in which input is handed on, and connections whose turn
# comes in it: what they begin, such as answering a request, is work of the next round.
_ROUND_SECONDS, _ROUND_TURNS = 0.005, 16


class Receiver(Protocol):
    """A connection that has input to hand on.

    Attributes:
      share: whose connection it is; None if it is a proxy's, which has those of many clients.
    """

    share: str | None

    def feed(self) -> None:
        """Hands on a small piece, and adds itself again if there is more."""


class InputScheduler:
    """Lets connections hand on their input, for a part of each round of the event loop.

    Clients take turns, and so do the connections of each. A piece of tiny chunks or frames is some
    milliseconds of work: without turns, those of many connections would hold up all others. To be
    used from one event loop.
    """

    def __init__(self):
        # In the order of their turns; a connection of a proxy stands for itself.
        self._waiting: dict[str | Receiver, deque[Receiver]] = {}
        self._is_scheduled = False

    def add(self, receiver: Receiver) -> None:
        """Calls `feed` once, when it is this connection's turn."""
        client = receiver if receiver.share is None else receiver.share
        self._waiting.setdefault(client, deque()).append(receiver)
        self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._is_scheduled = False
        deadline = time.monotonic() + _ROUND_SECONDS
        try:
            for _ in range(_ROUND_TURNS):
                if not self._waiting or time.monotonic() >= deadline:
                    break
                self._feed_next()
        finally:
            # What goes wrong with one connection is no matter of the others.
            self._schedule()

    def _feed_next(self) -> None:
        client, receivers = next(iter(self._waiting.items()))
        del self._waiting[client]
        receiver = receivers.popleft()
        if receivers:
            # Behind the other clients.
            self._waiting[client] = receivers
        receiver.feed()
