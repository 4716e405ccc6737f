"""Schedules the input of connections, so that clients share the event loop fairly."""

import asyncio
import time
from collections import deque
from typing import Protocol

# Seconds of each round of the event loop for input, and the connections that have a turn in it. The
# work that they cause, such as responding to a request, is done in the next round.
_ROUND_SECONDS, _ROUND_TURNS = 0.005, 16


class Receiver(Protocol):
    """A connection with input for its protocol.

    Attributes:
      share: of the client; None for a proxy, which has connections of many clients.
    """

    share: str | None

    def feed(self) -> None:
        """Hands on a small piece, and adds itself again if there is more."""


class InputScheduler:
    """Lets connections hand on their input during a part of each round of the event loop.

    Clients take turns, and so do the connections of each client. A piece of tiny chunks or frames
    takes some milliseconds, so without turns many connections of one client would block all
    others. To be used from one event loop.
    """

    def __init__(self):
        # In the order of their turns. Each connection of a proxy has its own turns.
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
            # An error of one connection must not affect the others.
            self._schedule()

    def _feed_next(self) -> None:
        client, receivers = next(iter(self._waiting.items()))
        del self._waiting[client]
        receiver = receivers.popleft()
        if receivers:
            # Moved behind the other clients.
            self._waiting[client] = receivers
        receiver.feed()
