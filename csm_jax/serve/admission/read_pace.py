"""Responses and how fast they are read: what waits in memory is bounded, one by one and in all."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from csm_jax.serve.settings import Limits

logger = logging.getLogger("csm_jax.serve")

_CHECK_SECONDS = 1.0


class Reader(Protocol):
    """A response on its way.

    Attributes:
      name: of the request, for the log.
      unread_seconds, taken_seconds: of speech that waits to be read, and that has been.
    """

    name: str
    unread_seconds: float
    taken_seconds: float

    def drop(self) -> None:
        """Ends the response and its request."""


@dataclass
class _Mark:
    """What a reader had taken at a time since which something has always waited for it."""

    time: float
    taken: float


class Readers:
    """All responses that are being read. To be used from one event loop."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._limits = limits
        self._clock = clock
        self._marks: dict[Reader, _Mark] = {}

    def add(self, reader: Reader) -> None:
        self._marks[reader] = _Mark(self._clock(), reader.taken_seconds)

    def remove(self, reader: Reader) -> None:
        self._marks.pop(reader, None)

    async def run(self) -> None:
        """Checks now and then, until it is cancelled; a check that fails is logged once."""
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
        """Drops readers that are too slow; of all together the slowest, until the rest fits."""
        for reader in list(self._marks):
            if self._is_too_slow(reader):
                self._drop(
                    reader, f"reads less than {self._limits.read_pace:g} s of speech a second"
                )
        limit = self._limits.unread_seconds
        while self._marks and sum(reader.unread_seconds for reader in self._marks) > limit:
            slowest = max(self._marks, key=lambda reader: reader.unread_seconds)
            self._drop(slowest, f"is the slowest while more than {limit:g} s of speech wait")

    def _is_too_slow(self, reader: Reader) -> bool:
        """Whether it has taken too little for long, though there was something to take."""
        mark, now = self._marks[reader], self._clock()
        if not reader.unread_seconds:
            self._marks[reader] = _Mark(now, reader.taken_seconds)
            return False
        elapsed, taken = now - mark.time, reader.taken_seconds - mark.taken
        if elapsed < self._limits.read_pace_seconds:
            return False
        self._marks[reader] = _Mark(now, reader.taken_seconds)
        return taken < elapsed * self._limits.read_pace

    def _drop(self, reader: Reader, why: str) -> None:
        self.remove(reader)
        logger.warning(
            "request %s is ended: its reader %s, and %.1f s wait",
            reader.name,
            why,
            reader.unread_seconds,
        )
        reader.drop()
