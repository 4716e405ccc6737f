"""Batches and their files in SQLite: what is written there is still there after `kill -9`.

A line is pending until its result is written, in one transaction; so after a restart none is lost
and none is there twice.
"""

import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, name TEXT, purpose TEXT, created INTEGER, data BLOB, batch TEXT);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, input_file TEXT, output_file TEXT, created INTEGER, ended INTEGER,
    is_cancelled INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS lines (
    batch TEXT, number INTEGER, body TEXT, result TEXT, is_good INTEGER,
    PRIMARY KEY (batch, number));
CREATE INDEX IF NOT EXISTS pending ON lines (batch, number) WHERE result IS NULL;
"""


_ADD_FILE = "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)"


class FileRow(NamedTuple):
    """`data` is None for the results of a batch, which are read line by line."""

    id: str
    name: str
    purpose: str
    created: int
    data: bytes | None
    batch: str | None


class BatchRow(NamedTuple):
    """Times are seconds since 1970; `ended` is None until all lines are done or given up."""

    id: str
    input_file: str
    output_file: str
    created: int
    ended: int | None
    is_cancelled: int
    total: int
    completed: int
    failed: int


class Line(NamedTuple):
    batch: str
    number: int
    body: str


class BatchStore:
    """All batches of a server. Safe for many threads."""

    def __init__(self, path: Path | None):
        """Args: path: of the database; None keeps it in memory."""
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path or ":memory:", check_same_thread=False)
        self._connection.executescript("PRAGMA journal_mode=WAL;" + _SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @property
    def num_bytes(self) -> int:
        """What is stored takes."""
        pages, free, size = (
            self._read(f"PRAGMA {name}", ())[0][0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def add_file(self, name: str, data: bytes) -> str:
        """Keeps the lines of a batch; returns the file's id."""
        file_id = _new_id("file-")
        self._write(_ADD_FILE, (file_id, name, "batch", int(time.time()), data, None))
        return file_id

    def find_file(self, file_id: str) -> FileRow | None:
        rows = self._read("SELECT * FROM files WHERE id = ?", (file_id,))
        return FileRow(*rows[0]) if rows else None

    def delete_file(self, file_id: str) -> None:
        """Of a batch's results, the batch goes too."""
        with self._lock, self._connection as connection:
            query = "SELECT batch FROM files WHERE id = ?"
            batch = connection.execute(query, (file_id,)).fetchone()
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
            connection.execute("DELETE FROM lines WHERE batch = ?", batch)
            connection.execute("DELETE FROM batches WHERE id = ?", batch)

    def add_batch(self, input_file: str, bodies: Sequence[str]) -> str:
        """Begins a batch of these lines; returns its id."""
        batch_id, output_id, now = _new_id("batch_"), _new_id("file-"), int(time.time())
        output = (output_id, f"{batch_id}_output.jsonl", "batch_output", now, None, batch_id)
        lines = [(batch_id, number, body, None, None) for number, body in enumerate(bodies)]
        with self._lock, self._connection as connection:
            connection.execute(_ADD_FILE, output)
            row = (batch_id, input_file, output_id, now, None, 0)
            connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)", row)
            connection.executemany("INSERT INTO lines VALUES (?, ?, ?, ?, ?)", lines)
        return batch_id

    def batches(self, batch_id: str | None = None) -> list[BatchRow]:
        """One, or all, the youngest first."""
        rows = self._read(
            "SELECT id, input_file, output_file, created, ended, is_cancelled, "
            "(SELECT COUNT(*) FROM lines WHERE batch = id), "
            "(SELECT COUNT(*) FROM lines WHERE batch = id AND is_good = 1), "
            "(SELECT COUNT(*) FROM lines WHERE batch = id AND is_good = 0) "
            "FROM batches WHERE ? IN ('', id) ORDER BY created DESC, rowid DESC",
            (batch_id or "",),
        )
        return [BatchRow(*row) for row in rows]

    def pending(self, but: Sequence[tuple[str, int]], count: int) -> list[Line]:
        """The next lines to speak, of the oldest batches, apart from some."""
        rows = self._read(
            "SELECT batch, number, body FROM lines JOIN batches ON id = batch "
            "WHERE result IS NULL AND ended IS NULL ORDER BY batches.rowid, number LIMIT ?",
            (count + len(but),),
        )
        return [Line(*row) for row in rows if (row[0], row[1]) not in but][:count]

    def write_result(self, line: Line, result: str, is_good: bool) -> None:
        """Keeps what came of a line, unless that is known; ends the batch with its last line."""
        with self._lock, self._connection as connection:
            connection.execute(
                "UPDATE lines SET result = ?, is_good = ? "
                "WHERE batch = ? AND number = ? AND result IS NULL",
                (result, is_good, line.batch, line.number),
            )
            connection.execute(
                "UPDATE batches SET ended = ? WHERE id = ? AND ended IS NULL AND NOT EXISTS "
                "(SELECT 1 FROM lines WHERE batch = id AND result IS NULL)",
                (int(time.time()), line.batch),
            )

    def cancel(self, batch_id: str) -> None:
        """What is not spoken yet will not be."""
        self._write(
            "UPDATE batches SET ended = ?, is_cancelled = 1 WHERE id = ? AND ended IS NULL",
            (int(time.time()), batch_id),
        )

    def results(self, batch_id: str) -> Iterator[str]:
        """What came of the lines so far, in their order; read as it is asked for."""
        last = -1
        query = (
            "SELECT number, result FROM lines WHERE batch = ? AND number > ? "
            "AND result IS NOT NULL ORDER BY number LIMIT 16"
        )
        while rows := self._read(query, (batch_id, last)):
            yield from (result for _, result in rows)
            last = rows[-1][0]

    def _read(self, query: str, values: Sequence) -> list[tuple]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def _write(self, query: str, values: Sequence) -> None:
        with self._lock, self._connection as connection:
            connection.execute(query, values)


def _new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex
