"""Limits of storage, per owner and in total."""

import sqlite3
from dataclasses import dataclass

from csm_jax.serve.errors import QuotaError

_USED_BY = """
SELECT COALESCE(SUM(num_bytes), 0) FROM (
    SELECT num_bytes FROM files WHERE owner = :owner
    UNION ALL SELECT num_bytes FROM batches WHERE owner = :owner
    UNION ALL SELECT num_bytes FROM voices WHERE owner = :owner
    UNION ALL SELECT num_bytes FROM jobs WHERE owner = :owner
    UNION ALL SELECT num_bytes FROM deliveries WHERE owner = :owner
    UNION ALL SELECT num_bytes FROM trash WHERE owner = :owner)
"""
# The fraction of the total that one of several owners may store.
_OWNER_FRACTION = 0.25


@dataclass(frozen=True)
class Quota:
    """The limits of storage.

    Attributes:
      total_bytes: of all owners.
      owner_bytes, owner_files, owner_batches, owner_voices: of one owner. An owner with an
        API key may fill a quarter of the total; without keys the one owner, "", may fill it.
      voices: of all owners.
    """

    total_bytes: int
    owner_bytes: int
    owner_files: int
    owner_batches: int
    owner_voices: int
    voices: int

    def check_bytes(self, connection: sqlite3.Connection, owner: str, more: int) -> None:
        """Raises `QuotaError` if there is no room for `more` bytes of an owner."""
        limit = self._bytes_of(owner)
        if used_by(connection, owner) + more > limit:
            raise QuotaError(f"files, batches, voices and jobs take {limit} bytes: delete some")
        if used(connection) + more > self.total_bytes:
            raise QuotaError(f"all that is stored here takes {self.total_bytes} bytes already")

    def is_exceeded(self, connection: sqlite3.Connection, owner: str) -> bool:
        """Whether an owner is over its limit; then its batches wait for deletions."""
        return (
            used_by(connection, owner) > self._bytes_of(owner)
            or used(connection) > self.total_bytes
        )

    def _bytes_of(self, owner: str) -> int:
        if not owner:
            return self.total_bytes
        return min(self.owner_bytes, int(_OWNER_FRACTION * self.total_bytes))


def check_count(count: int, limit: int, kind: str) -> None:
    """Raises `QuotaError` if there are `limit` things of a kind already."""
    if count >= limit:
        raise QuotaError(f"there are {limit} {kind} already: delete one first")


def used_by(connection: sqlite3.Connection, owner: str) -> int:
    """Bytes of an owner's rows, including deleted rows that are not removed yet."""
    return connection.execute(_USED_BY, {"owner": owner}).fetchone()[0]


def used(connection: sqlite3.Connection) -> int:
    """Bytes of the whole database, without its free pages."""
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size
