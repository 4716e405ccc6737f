"""The SQLite database, used in a thread of its own, and the handling of its failures."""

import asyncio
import contextlib
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from csm_jax.serve.errors import StorageError, StorageFullError
from csm_jax.serve.store import schema
from csm_jax.serve.store.directory import Directory, printable

logger = logging.getLogger("csm_jax.serve")

Arguments = TypeVarTuple("Arguments")
T = TypeVar("T")
Query = Callable[[sqlite3.Connection, *Arguments], T]

# Seconds between attempts at a transaction that must succeed, which double up to the last.
FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0
# Time limit of the check for damage at the start; the rest of a large database is not checked.
CHECK_SECONDS = 5.0
# A failure that lasts is logged again after so many seconds.
_LOG_SECONDS = 600.0
_WAL_BYTES = 4_000_000

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FAILURES = (
    *_DAMAGED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOLFS,
)


class Database:
    """Runs functions of a connection one after another, each in a transaction.

    Attributes:
      problems: why the server is not ready, by the kind of failure.
      is_full: whether the last write failed because the disk was full.
      num_failures: transactions that failed since the start.
      on_failure: called after each of them, in the database's thread.
    """

    def __init__(self, directory: Path | None):
        """Opens or creates the database.

        Args:
          directory: of the database; None keeps it in memory.

        Raises:
          OutputError: the directory cannot be used, or another server uses it.
          StorageError: the database is damaged, or not one of this server.
        """
        self.problems: dict[str, str] = {}
        self.is_full = False
        self.num_failures = 0
        self.on_failure: Callable[[], None] = lambda: None
        self._is_closed = False
        self._logged: dict[str, float] = {}
        self._clock = time.time() - time.monotonic()
        self._directory = None if directory is None else Directory(directory)
        try:
            self._connection = _open(self._directory)
        except BaseException:
            if self._directory is not None:
                self._directory.close()
            raise
        self._thread = ThreadPoolExecutor(1, "csm_jax.store")

    @property
    def is_durable(self) -> bool:
        """Whether it outlives the process."""
        return self._directory is not None

    def now(self) -> float:
        """Seconds since 1970, by a clock that is not adjusted while the process runs."""
        return self._clock + time.monotonic()

    async def run(self, query: Query[*Arguments, T], *arguments: *Arguments) -> T:
        """Calls `query(connection, *arguments)` in one transaction, and returns its result.

        Raises:
          StorageFullError, StorageError: the disk is full, or the database cannot be used.
        """
        return await asyncio.wrap_future(self._submit(self._transact, query, *arguments))

    def call(self, query: Query[*Arguments, T], *arguments: *Arguments) -> T:
        """The blocking form of `run`, for threads."""
        return self._submit(self._transact, query, *arguments).result()

    async def persist(self, query: Query[*Arguments, T], *arguments: *Arguments) -> T:
        """`run` for data that must not be lost: repeated with growing pauses until it succeeds."""
        pause = FIRST_PAUSE
        while True:
            try:
                return await self.run(query, *arguments)
            except StorageError:
                if self._is_closed:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, LAST_PAUSE)

    async def free(self, query: Query[*Arguments, T], *arguments: *Arguments) -> T:
        """`run` for deletions, which also work on a full disk."""
        return await asyncio.wrap_future(self._submit(self._free, query, *arguments))

    def call_free(self, query: Query[*Arguments, T], *arguments: *Arguments) -> T:
        """The blocking form of `free`, for threads."""
        return self._submit(self._free, query, *arguments).result()

    def report(self, name: str, message: str, error: BaseException | None = None) -> None:
        """Records why the server is not ready, and logs it, unless that was done recently."""
        self.problems[name] = message
        self._log_once(name, message, error)

    def check_directory(self) -> None:
        """Records whether the directory still exists, and reserves space after a full disk."""
        if self._directory is None:
            return
        if self._directory.is_intact():
            self.problems.pop("directory", None)
        else:
            self.report("directory", "the --data directory was deleted or replaced: restart")
        if not self.is_full:
            self._directory.keep_reserve()

    def close(self) -> None:
        """Waits for the queued transactions, and releases the directory. May be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
        if self._directory is not None:
            self._directory.close()

    def _submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        try:
            return self._thread.submit(function, *arguments)
        except RuntimeError as error:
            raise StorageError("the server is closing") from error

    def _transact(self, query: Query[*Arguments, T], *arguments: *Arguments) -> T:
        connection = self._connection
        before = connection.total_changes
        try:
            connection.execute("BEGIN")
            result = query(connection, *arguments)
            connection.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error) and _code(error) in _FAILURES:
                raise self._failed(error) from error
            raise
        if connection.total_changes != before:
            self._succeeded()
        return result

    def _free(self, query: Query[*Arguments, T], *arguments: *Arguments) -> T:
        try:
            return self._transact(query, *arguments)
        except StorageFullError:
            if self._directory is None:
                raise
            self._directory.release_reserve()
            return self._transact(query, *arguments)

    def _failed(self, error: sqlite3.Error) -> StorageError:
        self.num_failures += 1
        self.on_failure()
        if _code(error) == sqlite3.SQLITE_FULL:
            self.is_full = True
            self._log_once("full", "the disk of --data is full: batches and jobs wait for room")
            return StorageFullError("the server's disk is full: delete files, or try again later")
        name = "damage" if _code(error) in _DAMAGED else "database"
        advice = "stop the server and start it again to see what to do"
        self.report(name, f"the database of --data fails ({error}): {advice}")
        return StorageError("what is stored cannot be read or written now; the log says why")

    def _succeeded(self) -> None:
        if self.is_full:
            logger.info("the disk of --data has room again")
        self.is_full = False
        # A damaged database stays damaged, even if other pages can be written.
        self.problems.pop("database", None)

    def _log_once(self, name: str, message: str, error: BaseException | None = None) -> None:
        now = time.monotonic()
        if now - self._logged.get(name, -math.inf) >= _LOG_SECONDS:
            self._logged[name] = now
            logger.error("%s", message, exc_info=error)


def _open(directory: Directory | None) -> sqlite3.Connection:
    """Opens and checks the database. Raises `StorageError` with the way out."""
    if directory is None:
        return _connect(":memory:")
    try:
        return _connect(directory.database)
    except (sqlite3.Error, schema.SchemaError) as error:
        message = f"{printable(directory.database)} cannot be used: {_explain(error)}"
        raise StorageError(message) from error


def _explain(error: Exception) -> str:
    code = _code(error)
    if isinstance(error, schema.SchemaError):
        return f"{error}, or name another --data"
    if code in _DAMAGED:
        return f"it is damaged ({error}); restore a backup, or move it away to start with nothing"
    if code == sqlite3.SQLITE_FULL:
        return "the disk is full; make room, or name another --data"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "another process uses it; stop that, or name another --data"
    return f"{error}; look at its permissions and its disk, or name another --data"


def _connect(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
    try:
        for pragma in (
            # Also avoids the file of shared memory beside the log, which fails on a full disk.
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = FULL",
            f"journal_size_limit = {_WAL_BYTES}",
            "trusted_schema = OFF",
            "cell_size_check = ON",
            "secure_delete = FAST",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        _check(connection)
        connection.execute("BEGIN IMMEDIATE")
        schema.prepare(connection)
        connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    """Checks for damage, for a limited time. Raises `sqlite3.DatabaseError` if there is some."""
    timer = threading.Timer(CHECK_SECONDS, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:
        if _code(error) != sqlite3.SQLITE_INTERRUPT:
            raise
        logger.info("the database is large: it was checked for %g s only", CHECK_SECONDS)
        return
    finally:
        timer.cancel()
    if found != "ok":
        damage = sqlite3.DatabaseError(found.splitlines()[-1])
        damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise damage


def _code(error: Exception) -> int | None:
    """The primary result code of SQLite; None for other errors."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
