"""Reads stored bytes in pieces, so that a large file is never in memory as a whole."""

import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass

from csm_jax.serve.errors import StorageError
from csm_jax.serve.store.database import Database

# Bytes that are read at once. SQLite skips the pages before them one by one each time.
PIECE_BYTES = 262_144


@dataclass(frozen=True)
class Blob:
    """Bytes in the column `data` of one row.

    Attributes:
      table: its name.
      key: the column and the value of the primary key. Row numbers are reused after a deletion, so
        that they could lead to the bytes of another owner.
      num_bytes: the length.
    """

    table: str
    key: tuple[str, str]
    num_bytes: int

    async def pieces(self, database: Database) -> AsyncIterator[bytes]:
        """The bytes in order. Raises `StorageError` if they are deleted during that."""
        for start in range(0, self.num_bytes, PIECE_BYTES):
            yield await database.run(self._read, start)

    def _read(self, connection: sqlite3.Connection, start: int) -> bytes:
        column, value = self.key
        query = f"SELECT rowid FROM {self.table} WHERE {column} = ?"  # noqa: S608, our own names
        if (row := connection.execute(query, (value,)).fetchone()) is None:
            raise StorageError("the file was deleted while it was being sent")
        with connection.blobopen(self.table, "data", row[0], readonly=True) as opened:
            opened.seek(start)
            return opened.read(PIECE_BYTES)
