"""Files that answers point to: kept in memory for a while."""

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """Attributes: name: random, so that nobody finds it who was not told."""

    name: str
    media_type: str
    data: bytes
    until: float


class Files:
    """The youngest files, up to a number of bytes and an age."""

    def __init__(self, max_bytes: int = 256_000_000, seconds: float = 3600.0):
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._files: OrderedDict[str, File] = OrderedDict()
        self._num_bytes = 0

    def add(self, data: bytes, media_type: str, suffix: str) -> File:
        """Keeps a file under a new name."""
        name = f"{secrets.token_urlsafe(18)}.{suffix}"
        file = self._files[name] = File(name, media_type, data, time.monotonic() + self._seconds)
        self._num_bytes += len(data)
        self._drop()
        return file

    def find(self, name: str) -> File | None:
        """The file, if it is still there."""
        self._drop()
        return self._files.get(name)

    def _drop(self) -> None:
        now = time.monotonic()
        while self._files:
            oldest = next(iter(self._files.values()))
            if oldest.until > now and self._num_bytes <= self._max_bytes:
                return
            del self._files[oldest.name]
            self._num_bytes -= len(oldest.data)
