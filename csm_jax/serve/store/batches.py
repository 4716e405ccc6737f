"""Uploaded files, batches, and their results.

A line is pending until its result is written in one transaction, so that a restart neither loses
nor repeats lines.
"""

import json
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from typing import NamedTuple

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.store.blobs import Blob
from csm_jax.serve.store.database import Database
from csm_jax.serve.store.quota import Quota, check_count

# Lines of a deleted batch that one transaction removes, and about how many bytes.
_PURGED_LINES = 1000
_PURGED_BYTES = 4_000_000
# Bytes of results that are read at once, if a single one is not longer.
_RESULT_BYTES = 1_000_000


class FileRow(NamedTuple):
    """A file.

    Attributes:
      batch: the batch whose results the file contains; None for an upload.
    """

    id: str
    name: str
    purpose: str
    created: int
    num_bytes: int
    batch: str | None


class BatchRow(NamedTuple):
    """A batch. Times are seconds since 1970; `ended` is None until it is completed or cancelled."""

    id: str
    input_file: str
    output_file: str
    created: int
    ended: int | None
    is_cancelled: int
    metadata: str | None
    total: int
    completed: int
    failed: int


class NewLine(NamedTuple):
    """A line of a new batch, with its checked body as JSON."""

    custom_id: str
    body: str


class Line(NamedTuple):
    """A pending line and the caller of its batch."""

    batch: str
    number: int
    custom_id: str
    body: str
    caller: Caller

    @property
    def key(self) -> tuple[str, int]:
        return self.batch, self.number


class Page(NamedTuple):
    """A page of a list, and whether there are further rows."""

    rows: list
    has_more: bool


_FILE = "SELECT id, name, purpose, created, num_bytes, batch FROM files "
_BATCH = (
    "SELECT id, input_file, output_file, created, ended, is_cancelled, metadata, total, "
    "completed, failed FROM batches "
)
_ONE = "WHERE id = ? AND owner = ?"
_PAGE = "WHERE owner = :owner AND rowid < :last ORDER BY rowid DESC LIMIT :limit"


class _List(NamedTuple):
    """Queries for the position of a row, and for the rows after a position."""

    position: str
    rows: str


_FILES = _List("SELECT rowid FROM files WHERE id = ? AND owner = ?", _FILE + _PAGE)
_BATCHES = _List("SELECT rowid FROM batches WHERE id = ? AND owner = ?", _BATCH + _PAGE)


class Batches:
    """All files and batches of a server."""

    def __init__(self, database: Database, quota: Quota):
        self._database = database
        self._quota = quota

    async def add_file(self, owner: str, name: str, data: bytes) -> FileRow:
        """Stores an upload. Raises `QuotaError`."""
        return await self._database.run(self._add_file, owner, name, data)

    async def find_file(self, file_id: str, owner: str) -> FileRow | None:
        return await self._database.run(_find_file, file_id, owner)

    def read_file(self, file_id: str, owner: str) -> bytes | None:
        """The bytes of an upload; None if this owner has none of that id. It blocks."""

        def read(connection: sqlite3.Connection) -> bytes | None:
            query = "SELECT data FROM uploads JOIN files ON id = file WHERE id = ? AND owner = ?"
            found = connection.execute(query, (file_id, owner)).fetchone()
            return found and found[0]

        return self._database.call(read)

    def read_upload(self, file: FileRow) -> AsyncIterator[bytes]:
        """The bytes of an upload. Raises `StorageError` if it is deleted during that."""
        return Blob("uploads", ("file", file.id), file.num_bytes).pieces(self._database)

    async def list_files(self, owner: str, after: str | None, limit: int) -> Page | None:
        """An owner's files, newest first, after `after`; None if that does not exist."""
        return await self._database.run(_list, _FILES, FileRow, owner, after, limit)

    async def delete_file(self, file_id: str, owner: str) -> FileRow | None:
        """Removes a file, and the batch whose results it contains; None if it does not exist."""
        return await self._database.free(_delete_file, file_id, owner)

    def add_batch(
        self,
        caller: Caller,
        lines: Sequence[NewLine],
        metadata: dict[str, str] | None,
        input_file: str | None,
        data: bytes = b"",
    ) -> BatchRow:
        """Stores a new batch of these lines. It blocks.

        Args:
          input_file: id of the upload with these lines; None stores `data` as a new upload.

        Raises:
          QuotaError: the owner is over its limit.
        """
        about = None if metadata is None else json.dumps(metadata)
        return self._database.call(self._add_batch, caller, lines, about, input_file, data)

    async def find(self, batch_id: str, owner: str) -> BatchRow | None:
        return await self._database.run(_find, batch_id, owner)

    async def list(self, owner: str, after: str | None, limit: int) -> Page | None:
        """An owner's batches, newest first, after `after`; None if that does not exist."""
        return await self._database.run(_list, _BATCHES, BatchRow, owner, after, limit)

    async def cancel(self, batch_id: str, owner: str) -> BatchRow | None:
        """Cancels a batch that has not ended; None if it does not exist."""

        def cancel(connection: sqlite3.Connection) -> BatchRow | None:
            connection.execute(
                "UPDATE batches SET ended = ?, is_cancelled = 1 "
                "WHERE id = ? AND owner = ? AND ended IS NULL",
                (int(time.time()), batch_id, owner),
            )
            return _find(connection, batch_id, owner)

        return await self._database.free(cancel)

    async def next_line(self, running: Collection[Line]) -> Line | None:
        """The next line to run, of the share with the fewest running lines for its weight."""
        return await self._database.run(self._next_line, running)

    async def write_result(self, line: Line, result: str, is_good: bool) -> None:
        """Stores the result of a line, if it has none yet; the last one ends the batch."""
        await self._database.persist(_write_result, line, result, is_good)

    async def results(self, batch_id: str) -> AsyncIterator[str]:
        """The results so far, in the order of the lines, read in pieces."""
        last = -1
        while rows := await self._database.run(_read_results, batch_id, last):
            for _, result in rows:
                yield result
            last = rows[-1][0]

    async def purge(self) -> bool:
        """Removes some lines of deleted batches; returns whether there may be more."""
        return await self._database.free(_purge)

    def _add_file(
        self, connection: sqlite3.Connection, owner: str, name: str, data: bytes
    ) -> FileRow:
        quota = self._quota
        count = connection.execute("SELECT COUNT(*) FROM files WHERE owner = ?", (owner,))
        check_count(count.fetchone()[0], quota.owner_files, "files")
        quota.check_bytes(connection, owner, len(data))
        file = FileRow(_new_id("file-"), name, "batch", int(time.time()), len(data), None)
        _insert_file(connection, file, owner, data)
        return file

    def _add_batch(
        self,
        connection: sqlite3.Connection,
        caller: Caller,
        lines: Sequence[NewLine],
        metadata: str | None,
        input_file: str | None,
        data: bytes,
    ) -> BatchRow:
        quota, owner = self._quota, caller.owner
        count = connection.execute("SELECT COUNT(*) FROM batches WHERE owner = ?", (owner,))
        check_count(count.fetchone()[0], quota.owner_batches, "batches")
        size = len((metadata or "").encode())
        size += sum(len(name.encode()) + len(body.encode()) for name, body in lines)
        quota.check_bytes(connection, owner, size)
        if input_file is None:
            input_file = self._add_file(connection, owner, "input.jsonl", data).id
        batch_id, output_id, now = _new_id("batch_"), _new_id("file-"), int(time.time())
        name, identity = f"{batch_id}_output.jsonl", (owner, caller.share, caller.weight)
        output = FileRow(output_id, name, "batch_output", now, 0, batch_id)
        _insert_file(connection, output, owner, None)
        connection.execute(
            "INSERT INTO batches (owner, share, weight, id, input_file, output_file, created, "
            "metadata, total, num_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*identity, batch_id, input_file, output_id, now, metadata, len(lines), size),
        )
        connection.executemany(
            "INSERT INTO lines (batch, number, custom_id, body) VALUES (?, ?, ?, ?)",
            ((batch_id, number, *line) for number, line in enumerate(lines)),
        )
        return BatchRow(batch_id, input_file, output_id, now, None, 0, metadata, len(lines), 0, 0)

    def _next_line(self, connection: sqlite3.Connection, running: Collection[Line]) -> Line | None:
        counts = Counter(line.caller.share for line in running)
        rows = connection.execute(
            "SELECT id, owner, share, weight FROM batches WHERE ended IS NULL ORDER BY rowid"
        ).fetchall()
        is_full: dict[str, bool] = {}
        # Sorting is stable, so equal batches stay in their order.
        for batch, *identity in sorted(rows, key=lambda row: counts[row[2]] / row[3]):
            caller = Caller(*identity)
            if caller.owner not in is_full:
                is_full[caller.owner] = self._quota.is_exceeded(connection, caller.owner)
            if is_full[caller.owner]:
                continue
            taken = json.dumps([line.number for line in running if line.batch == batch])
            found = connection.execute(
                "SELECT number, custom_id, body FROM lines WHERE batch = ? AND result IS NULL "
                "AND number NOT IN (SELECT value FROM json_each(?)) ORDER BY number LIMIT 1",
                (batch, taken),
            ).fetchone()
            if found:
                number, custom_id, body = found
                return Line(batch, number, custom_id, body, caller)
        return None


def _insert_file(
    connection: sqlite3.Connection, file: FileRow, owner: str, data: bytes | None
) -> None:
    connection.execute(
        "INSERT INTO files (owner, id, name, purpose, created, num_bytes, batch) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (owner, *file),
    )
    if data is not None:
        connection.execute("INSERT INTO uploads VALUES (?, ?)", (file.id, data))


def _find_file(connection: sqlite3.Connection, file_id: str, owner: str) -> FileRow | None:
    found = connection.execute(_FILE + _ONE, (file_id, owner)).fetchone()
    return found and FileRow(*found)


def _find(connection: sqlite3.Connection, batch_id: str, owner: str) -> BatchRow | None:
    found = connection.execute(_BATCH + _ONE, (batch_id, owner)).fetchone()
    return found and BatchRow(*found)


def _list(
    connection: sqlite3.Connection,
    queries: _List,
    row_type: type,
    owner: str,
    after: str | None,
    limit: int,
) -> Page | None:
    last = 2**63 - 1
    if after is not None:
        found = connection.execute(queries.position, (after, owner)).fetchone()
        if found is None:
            return None
        last = found[0]
    values = {"owner": owner, "last": last, "limit": limit + 1}
    rows = [row_type(*row) for row in connection.execute(queries.rows, values)]
    return Page(rows[:limit], len(rows) > limit)


def _delete_file(connection: sqlite3.Connection, file_id: str, owner: str) -> FileRow | None:
    if (found := _find_file(connection, file_id, owner)) is None:
        return None
    connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
    connection.execute("DELETE FROM uploads WHERE file = ?", (file_id,))
    if found.batch is not None:
        connection.execute(
            "INSERT INTO trash SELECT id, owner, num_bytes FROM batches WHERE id = ?",
            (found.batch,),
        )
        connection.execute("DELETE FROM batches WHERE id = ?", (found.batch,))
    return found


def _write_result(connection: sqlite3.Connection, line: Line, result: str, is_good: bool) -> None:
    written = connection.execute(
        "UPDATE lines SET result = ?, is_good = ? WHERE batch = ? AND number = ? "
        "AND result IS NULL AND EXISTS (SELECT 1 FROM batches WHERE id = batch)",
        (result, is_good, *line.key),
    )
    if written.rowcount == 1:
        connection.execute(
            "UPDATE batches SET completed = completed + ?, failed = failed + ?, "
            "num_bytes = num_bytes + ? WHERE id = ?",
            (is_good, not is_good, len(result.encode()), line.batch),
        )
        connection.execute(
            "UPDATE batches SET ended = ? "
            "WHERE id = ? AND ended IS NULL AND completed + failed >= total",
            (int(time.time()), line.batch),
        )


def _read_results(
    connection: sqlite3.Connection, batch_id: str, last: int
) -> list[tuple[int, str]]:
    rows, size = [], 0
    for row in connection.execute(
        "SELECT number, result FROM lines WHERE batch = ? AND number > ? "
        "AND result IS NOT NULL ORDER BY number",
        (batch_id, last),
    ):
        rows.append(row)
        size += len(row[1])
        if size >= _RESULT_BYTES:
            break
    return rows


def _purge(connection: sqlite3.Connection) -> bool:
    if (found := connection.execute("SELECT batch, num_bytes FROM trash").fetchone()) is None:
        return False
    batch, size = found
    numbers, gone = [], 0
    for number, length in connection.execute(
        "SELECT number, length(CAST(body AS BLOB)) + length(CAST(custom_id AS BLOB)) + "
        "COALESCE(length(CAST(result AS BLOB)), 0) "
        "FROM lines WHERE batch = ? ORDER BY number LIMIT ?",
        (batch, _PURGED_LINES),
    ):
        numbers.append(number)
        gone += length
        if gone >= _PURGED_BYTES:
            break
    if not numbers:
        connection.execute("DELETE FROM trash WHERE batch = ?", (batch,))
        return True
    connection.execute("DELETE FROM lines WHERE batch = ? AND number <= ?", (batch, numbers[-1]))
    left = max(0, size - gone)
    connection.execute("UPDATE trash SET num_bytes = ? WHERE batch = ?", (left, batch))
    return True


def _new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex
