"""Files to which responses refer: kept for a limited time, under names that cannot be guessed.

A name is a capability: fal's clients fetch the file without a key. It has 144 random bits.
"""

import secrets
import sqlite3
from collections.abc import AsyncIterator
from typing import NamedTuple

from csm_jax.serve.store.blobs import Blob
from csm_jax.serve.store.database import Database

KEPT_SECONDS = 3600.0
_NAME_BYTES = 18


class Download(NamedTuple):
    """A stored file, without its bytes."""

    name: str
    media_type: str
    num_bytes: int


class Downloads:
    """The newest files of each owner, up to a number of bytes and an age."""

    def __init__(self, database: Database, max_bytes: int, owner_bytes: int):
        """Uses the table of a database.

        Args:
          max_bytes, owner_bytes: limits of all owners together, and of one.
        """
        self._database = database
        self._max_bytes = max_bytes
        self._owner_bytes = owner_bytes

    async def add(self, owner: str, data: bytes, media_type: str, suffix: str) -> Download:
        """Stores a file under a new name; older ones are removed to make room."""
        name = f"{secrets.token_urlsafe(_NAME_BYTES)}.{suffix}"
        file = Download(name, media_type, len(data))
        until = self._database.now() + KEPT_SECONDS
        await self._database.run(self._add, owner, file, data, until)
        return file

    async def find(self, name: str) -> Download | None:
        """The file of a name, if it still exists."""

        def find(connection: sqlite3.Connection, now: float) -> Download | None:
            query = "SELECT name, media_type, num_bytes FROM downloads WHERE name = ? AND until > ?"
            found = connection.execute(query, (name, now)).fetchone()
            return found and Download(*found)

        return await self._database.run(find, self._database.now())

    def read(self, file: Download) -> AsyncIterator[bytes]:
        """The bytes of a file. Raises `StorageError` if it is removed during that."""
        blob = Blob("downloads", ("name", file.name), file.num_bytes)
        return blob.pieces(self._database)

    async def expire(self) -> None:
        """Removes expired files."""

        def expire(connection: sqlite3.Connection, now: float) -> None:
            connection.execute("DELETE FROM downloads WHERE until <= ?", (now,))

        await self._database.free(expire, self._database.now())

    def _add(
        self,
        connection: sqlite3.Connection,
        owner: str,
        file: Download,
        data: bytes,
        until: float,
    ) -> None:
        own = connection.execute(
            "SELECT name, num_bytes FROM downloads WHERE owner = ? ORDER BY until", (owner,)
        ).fetchall()
        _make_room(
            connection, own, (self._owner_bytes if owner else self._max_bytes) - file.num_bytes
        )
        of_all = connection.execute("SELECT name, num_bytes FROM downloads ORDER BY until")
        _make_room(connection, of_all.fetchall(), self._max_bytes - file.num_bytes)
        connection.execute(
            "INSERT INTO downloads VALUES (?, ?, ?, ?, ?, ?)",
            (file.name, owner, file.media_type, until, file.num_bytes, data),
        )


def _make_room(connection: sqlite3.Connection, files: list[tuple[str, int]], most: int) -> None:
    """Removes the first of these files until the others take at most `most` bytes."""
    total = sum(size for _, size in files)
    for name, size in files:
        if total <= most:
            return
        connection.execute("DELETE FROM downloads WHERE name = ?", (name,))
        total -= size
