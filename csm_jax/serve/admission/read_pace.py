"""How fast clients read streamed speech, which bounds the unread speech in memory."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from csm_jax.serve.settings import Limits

logger = logging.getLogger("csm_jax.serve")

_CHECK_SECONDS = 1.0


class MonitoredStream(Protocol):
    """Speech on its way to a client.

    Attributes:
      name: of the request, for the log.
      unread_seconds, taken_seconds: of speech that the client has not read, and has read.
    """

    name: str
    unread_seconds: float
    taken_seconds: float

    def drop(self) -> None:
        """Ends the response and its request."""


@dataclass
class _Mark:
    """What a client had read at a time since which unread speech has always been waiting."""

    time: float
    taken: float


class ReadPaceMonitor:
    """Drops streams whose clients read too slowly. To be used from one event loop."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._limits = limits
        self._clock = clock
        self._marks: dict[MonitoredStream, _Mark] = {}

    def add(self, stream: MonitoredStream) -> None:
        self._marks[stream] = _Mark(self._clock(), stream.taken_seconds)

    def remove(self, stream: MonitoredStream) -> None:
        self._marks.pop(stream, None)

    async def run(self) -> None:
        """Checks all streams periodically, until it is cancelled; logs the first failed check."""
        is_failing = False
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                self.check()
                is_failing = False
            except Exception:
                if not is_failing:
                    logger.exception("slow readers are not dropped")
                is_failing = True

    def check(self) -> None:
        """Drops the streams that are too slow, and the slowest ones until the others fit."""
        for stream in list(self._marks):
            if self._is_too_slow(stream):
                self._drop(
                    stream, f"reads less than {self._limits.read_pace:g} s of speech a second"
                )
        limit = self._limits.unread_seconds
        while self._marks and sum(stream.unread_seconds for stream in self._marks) > limit:
            slowest = max(self._marks, key=lambda stream: stream.unread_seconds)
            self._drop(slowest, f"is the slowest while more than {limit:g} s of speech wait")

    def _is_too_slow(self, stream: MonitoredStream) -> bool:
        """Whether the client has read too little for long, though speech was waiting."""
        mark, now = self._marks[stream], self._clock()
        if not stream.unread_seconds:
            self._marks[stream] = _Mark(now, stream.taken_seconds)
            return False
        elapsed, taken = now - mark.time, stream.taken_seconds - mark.taken
        if elapsed < self._limits.read_pace_seconds:
            return False
        self._marks[stream] = _Mark(now, stream.taken_seconds)
        return taken < elapsed * self._limits.read_pace

    def _drop(self, stream: MonitoredStream, reason: str) -> None:
        self.remove(stream)
        logger.warning(
            "request %s is ended: its reader %s, and %.1f s wait",
            stream.name,
            reason,
            stream.unread_seconds,
        )
        stream.drop()
