"""The directory of a store: its lock, its permissions, its checks, and earlier versions."""

import asyncio
import contextlib
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import ANNA, LINE, add_batch

from csm_jax.errors import CSMError, OutputError
from csm_jax.serve.errors import StorageError
from csm_jax.serve.settings import Limits
from csm_jax.serve.store import Store, database

# One server, one directory.


def test_a_directory_in_use_is_refused(open_store, tmp_path):
    first = open_store(tmp_path)
    with pytest.raises(OutputError, match="in use by another server"):
        open_store(tmp_path)
    first.close()
    open_store(tmp_path)


def test_the_lock_ends_with_kill_9(open_store, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from csm_jax.serve.store import Store\n"
        "from csm_jax.serve.settings import Limits\n"
        "store = Store(Path(sys.argv[1]), Limits()); print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(OutputError, match="in use"):
            open_store(tmp_path)
        holder.send_signal(signal.SIGKILL)
    open_store(tmp_path)


def test_a_database_in_use_by_another_program_is_refused(open_store, tmp_path):
    """Such as a server of an earlier version, which does not know the lock file."""
    open_store(tmp_path).close()
    other = sqlite3.connect(tmp_path / "store.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="another process uses it"):
        open_store(tmp_path)
    other.close()
    open_store(tmp_path)


def test_a_directory_that_was_replaced_is_reported(open_store, tmp_path):
    store = open_store(tmp_path / "data")
    store.database.check_directory()
    assert store.problem is None
    (tmp_path / "data").rename(tmp_path / "other")
    store.database.check_directory()
    assert "restart" in store.problem


# Unusable directories and databases are refused at the start, in one line.


def garbage(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


def truncated(path: Path) -> None:
    store = Store(path.parent, Limits())
    asyncio.run(store.batches.add_file("", "a", bytes(500_000)))
    store.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def scribbled(path: Path) -> None:
    store = Store(path.parent, Limits())
    store.batches.add_batch(ANNA, [LINE] * 5000, None, None, b"")
    store.close()
    data = bytearray(path.read_bytes())
    for start in range(40_960, len(data) - 4096, 4096):
        data[start : start + 64] = b"\xa5" * 64
    path.write_bytes(data)


def of_another_program(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")


def without_a_table(path: Path) -> None:
    Store(path.parent, Limits()).close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE voices")


def with_a_trigger(path: Path) -> None:
    Store(path.parent, Limits()).close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TRIGGER t AFTER INSERT ON files BEGIN DELETE FROM files; END")


def of_a_newer_version(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA user_version = 99")


def a_directory(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    target.write_bytes(b"")
    path.symlink_to(target)


@pytest.mark.parametrize(
    "damage",
    [garbage, of_another_program, of_a_newer_version, a_directory, a_pipe, a_link],
)
def test_a_database_of_another_program_is_refused(open_store, tmp_path, damage):
    data = tmp_path / "data"
    data.mkdir()
    damage(data / "store.sqlite")
    with pytest.raises(CSMError, match=r"store\.sqlite") as refused:
        open_store(data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [truncated, scribbled, without_a_table, with_a_trigger])
def test_a_damaged_database_is_refused(open_store, tmp_path, damage):
    damage(tmp_path / "store.sqlite")
    before = (tmp_path / "store.sqlite").read_bytes()
    with pytest.raises(StorageError, match=r"store\.sqlite") as refused:
        open_store(tmp_path)
    assert "\n" not in str(refused.value)
    assert (tmp_path / "store.sqlite").read_bytes() == before


class Impatient:
    """A timer that fires as soon as the connection is busy."""

    def __init__(self, _: float, interrupt: Callable[[], None]):
        self._connection = interrupt.__self__
        self.daemon = False

    def start(self) -> None:
        self._connection.set_progress_handler(lambda: 1, 100)

    def cancel(self) -> None:
        self._connection.set_progress_handler(None, 0)


def test_the_check_for_damage_has_a_time_limit(open_store, tmp_path, monkeypatch, caplog):
    store = open_store(tmp_path)
    add_batch(store, count=50_000)
    store.close()
    monkeypatch.setattr(database.threading, "Timer", Impatient)
    with caplog.at_level(logging.INFO):
        open_store(tmp_path)
    assert "checked for 5 s only" in caplog.text


@pytest.mark.parametrize("name", ["a\nb", "ä ö", "%s'\"--", "a" * 200])
def test_a_directory_can_have_any_name(open_store, tmp_path, name):
    batch = add_batch(open_store(tmp_path / name))
    assert asyncio.run(open_store(None).batches.find(batch.id, "anna")) is None
    with pytest.raises(OutputError) as refused:
        open_store(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_file_instead_of_the_directory_is_refused(open_store, tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(OutputError, match="cannot be used"):
        open_store(tmp_path / "data")


def test_damage_during_operation_is_reported_once(open_store, tmp_path, caplog):
    store = open_store(tmp_path)
    add_batch(store)

    def fail(connection: sqlite3.Connection) -> None:
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    with caplog.at_level(logging.ERROR):
        for _ in range(20):
            with pytest.raises(StorageError):
                store.database.call(fail)
    assert len(caplog.records) == 1
    assert "malformed" in store.problem
    # A page that can still be written does not repair it.
    add_batch(store)
    assert store.problem is not None


def test_a_passing_failure_ends_with_the_next_success(open_store, tmp_path):
    store = open_store(tmp_path)

    def fail(connection: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        raise error

    with pytest.raises(StorageError):
        store.database.call(fail)
    assert "I/O" in store.problem
    add_batch(store)
    assert store.problem is None


# Files are private.


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_files_are_private_with_any_umask(open_store, tmp_path, umask):
    data = tmp_path / "data"
    before = os.umask(umask)
    try:
        add_batch(open_store(data))
    finally:
        os.umask(before)
    assert modes(data) == {data: 0o700} | dict.fromkeys(data.iterdir(), 0o600)
    assert len(list(data.iterdir())) >= 3


def test_readable_files_become_private(open_store, tmp_path):
    data = tmp_path / "data"
    store = open_store(data)
    add_batch(store)
    store.close()
    for path in (data, *data.iterdir()):
        path.chmod(0o777)
    open_store(data)
    assert modes(data) == {data: 0o700} | dict.fromkeys(data.iterdir(), 0o600)


def test_a_directory_with_other_files_keeps_its_mode(open_store, tmp_path):
    """Otherwise `--data=/tmp` would make /tmp unusable for other programs."""
    tmp_path.chmod(0o755)
    (tmp_path / "letters.txt").write_text("")
    open_store(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "store.sqlite").stat().st_mode) == 0o600


def modes(directory: Path) -> dict[Path, int]:
    paths = (directory, *directory.iterdir())
    return {path: stat.S_IMODE(path.stat().st_mode) for path in paths}


# Earlier versions.


def test_a_database_of_an_older_version_is_refused(open_store, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite")) as old:
        old.execute("CREATE TABLE batches (id TEXT)")
    with pytest.raises(StorageError, match="not a database of this server: move it away, or"):
        open_store(tmp_path)
