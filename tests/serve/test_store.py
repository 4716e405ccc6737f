"""The database of a server: locked, private, checked, with owners, and safe on a full disk."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from csm_jax.errors import CSMError, OutputError
from csm_jax.serve.caller import Caller
from csm_jax.serve.settings import Limits
from csm_jax.serve.store import Store, database
from csm_jax.serve.store.errors import QuotaError, StorageError, StorageFullError
from csm_jax.serve.store.voices import VoiceRow

ANNA, BEN = Caller("anna", "anna", 1.0), Caller("ben", "ben", 1.0)
BODY = '{"custom_id": "a"}'


@pytest.fixture
def opened():
    """Opens stores, and closes them at the end."""
    stores = []

    def open_store(directory: Path | None = None, **limits) -> Store:
        stores.append(Store(directory, Limits(**limits)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def add_batch(store: Store, caller: Caller = ANNA, count: int = 3):
    return asyncio.run(store.batches.add_batch(caller, [BODY] * count, None, None, b"lines"))


def limit_pages(store: Store, more: int | None) -> None:
    """Lets the database grow by so many pages of 4 kB; None is any number."""

    def limit(connection: sqlite3.Connection) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        most = 2**30 if more is None else pages + more
        connection.execute(f"PRAGMA max_page_count = {most}").fetchall()

    store.database.call(limit)


# One server, one directory.


def test_a_directory_has_one_server(opened, tmp_path):
    first = opened(tmp_path)
    with pytest.raises(OutputError, match="in use by another server"):
        opened(tmp_path)
    first.close()
    opened(tmp_path)


def test_the_lock_ends_with_kill_9(opened, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from csm_jax.serve.store import Store\n"
        "from csm_jax.serve.settings import Limits\n"
        "store = Store(Path(sys.argv[1]), Limits()); print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(OutputError, match="in use"):
            opened(tmp_path)
        holder.send_signal(signal.SIGKILL)
    opened(tmp_path)


def test_a_database_in_use_by_another_program_is_refused(opened, tmp_path):
    """Such as a server of an earlier version, which knows no lock file."""
    opened(tmp_path).close()
    other = sqlite3.connect(tmp_path / "store.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="another process uses it"):
        opened(tmp_path)
    other.close()
    opened(tmp_path)


def test_a_directory_that_was_replaced_is_reported(opened, tmp_path):
    store = opened(tmp_path / "data")
    store.database.check_directory()
    assert store.problem is None
    (tmp_path / "data").rename(tmp_path / "other")
    store.database.check_directory()
    assert "restart" in store.problem


# What cannot be used is refused at the start, in one line.


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
    asyncio.run(store.batches.add_batch(ANNA, [BODY] * 5000, None, None, b""))
    store.close()
    data = bytearray(path.read_bytes())
    for start in range(40_960, len(data) - 4096, 4096):
        data[start : start + 64] = b"\xa5" * 64
    path.write_bytes(data)


def of_another_program(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")


def without_a_table(path: Path) -> None:
    Store(path.parent, Limits()).close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE voices")


def with_a_trigger(path: Path) -> None:
    Store(path.parent, Limits()).close()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TRIGGER t AFTER INSERT ON files BEGIN DELETE FROM files; END")


def of_a_newer_version(path: Path) -> None:
    with sqlite3.connect(path) as connection:
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
def test_what_is_no_database_of_this_server_is_refused(opened, tmp_path, damage):
    data = tmp_path / "data"
    data.mkdir()
    damage(data / "store.sqlite")
    with pytest.raises(CSMError, match=r"store\.sqlite") as refused:
        opened(data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [truncated, scribbled, without_a_table, with_a_trigger])
def test_a_damaged_database_is_refused(opened, tmp_path, damage):
    damage(tmp_path / "store.sqlite")
    before = (tmp_path / "store.sqlite").read_bytes()
    with pytest.raises(StorageError, match=r"store\.sqlite") as refused:
        opened(tmp_path)
    assert "\n" not in str(refused.value)
    assert (tmp_path / "store.sqlite").read_bytes() == before


class Impatient(threading.Thread):
    """A timer that goes off at once, and again until it is cancelled."""

    def __init__(self, _: float, interrupt: Callable[[], None]):
        super().__init__(daemon=True)
        self._interrupt, self._is_over = interrupt, threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(0.0005):
            self._interrupt()

    def cancel(self) -> None:
        self._is_over.set()
        self.join()


def test_looking_for_damage_takes_bounded_time(opened, tmp_path, monkeypatch, caplog):
    store = opened(tmp_path)
    add_batch(store, count=50_000)
    store.close()
    monkeypatch.setattr(database.threading, "Timer", Impatient)
    with caplog.at_level(logging.INFO):
        opened(tmp_path)
    assert "looked through for 5 s only" in caplog.text


@pytest.mark.parametrize("name", ["a\nb", "ä ö", "%s'\"--", "a" * 200])
def test_a_directory_can_have_any_name(opened, tmp_path, name):
    batch = add_batch(opened(tmp_path / name))
    assert asyncio.run(opened(None).batches.find(batch.id, "anna")) is None
    with pytest.raises(OutputError) as refused:
        opened(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_file_in_the_place_of_the_directory_is_refused(opened, tmp_path):
    (tmp_path / "data").write_text("")
    with pytest.raises(OutputError, match="cannot be used"):
        opened(tmp_path / "data")


def test_what_breaks_while_the_server_runs_is_reported_once(opened, tmp_path, caplog):
    store = opened(tmp_path)
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
    # One page that can still be written does not make it whole.
    add_batch(store)
    assert store.problem is not None


def test_a_passing_failure_is_over_with_the_next_success(opened, tmp_path):
    store = opened(tmp_path)

    def fail(connection: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        raise error

    with pytest.raises(StorageError):
        store.database.call(fail)
    assert "I/O" in store.problem
    add_batch(store)
    assert store.problem is None


# Nobody else reads it.


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_everything_is_private_whatever_the_umask(opened, tmp_path, umask):
    data = tmp_path / "data"
    before = os.umask(umask)
    try:
        add_batch(opened(data))
    finally:
        os.umask(before)
    assert modes(data) == {data: 0o700} | dict.fromkeys(data.iterdir(), 0o600)
    assert len(list(data.iterdir())) >= 3


def test_what_was_readable_becomes_private(opened, tmp_path):
    data = tmp_path / "data"
    store = opened(data)
    add_batch(store)
    store.close()
    for path in (data, *data.iterdir()):
        path.chmod(0o777)
    opened(data)
    assert modes(data) == {data: 0o700} | dict.fromkeys(data.iterdir(), 0o600)


def test_a_directory_of_other_things_keeps_its_mode(opened, tmp_path):
    """Or `--data=/tmp` would lock everybody out of it."""
    tmp_path.chmod(0o755)
    (tmp_path / "letters.txt").write_text("")
    opened(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "store.sqlite").stat().st_mode) == 0o600


def modes(directory: Path) -> dict[Path, int]:
    paths = (directory, *directory.iterdir())
    return {path: stat.S_IMODE(path.stat().st_mode) for path in paths}


# Earlier versions.


def test_a_database_of_an_older_version_is_refused(opened, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "store.sqlite")) as old:
        old.execute("CREATE TABLE batches (id TEXT)")
    with pytest.raises(StorageError, match="not a database of this server: move it away, or"):
        opened(tmp_path)


async def _all(items) -> list:
    return [item async for item in items]


# Owners.


def test_other_owners_find_nothing(opened):
    store = opened()
    batch = add_batch(store, ANNA)
    input_file, output_file = batch.input_file, batch.output_file

    async def look(owner: str) -> list:
        batches = store.batches
        found = [await batches.find(batch.id, owner), await batches.cancel(batch.id, owner)]
        for file in (input_file, output_file):
            found.append(await batches.find_file(file, owner))
        found.append(await batches.read_file(input_file, owner))
        found.append(await batches.list(owner, batch.id, 10))
        found.append(await batches.list_files(owner, input_file, 10))
        found.append(await batches.delete_file(output_file, owner))
        return found

    for owner in ("", "ben", "ANNA", "ann", "%", "anna\0", "\uff41nna"):
        assert asyncio.run(look(owner)) == [None] * 8
        assert asyncio.run(store.batches.list(owner, None, 10)).rows == []
        assert asyncio.run(store.batches.list_files(owner, None, 10)).rows == []
    assert None not in asyncio.run(look("anna"))


@pytest.mark.parametrize("name", ["%", "_", "batch_%", "\0", "' OR '1'='1", "file-%"])
def test_no_pattern_finds_anything(opened, name):
    store = opened()
    add_batch(store)
    for find in (store.batches.find, store.batches.find_file, store.batches.read_file):
        assert asyncio.run(find(name, "anna")) is None
    assert asyncio.run(store.batches.delete_file(name, "anna")) is None


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_the_pages_of_a_list_are_the_whole_list(opened, limit, monkeypatch):
    store = opened()
    clock = itertools.cycle([5, 3, 9, 9, 1, 7, 2])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    made = [add_batch(store).id for _ in range(7)]
    seen, after = [], None
    while True:
        page = asyncio.run(store.batches.list("anna", after, limit))
        seen += [row.id for row in page.rows]
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == made[::-1]


def test_shares_take_turns_by_weight(opened):
    store = opened()
    add_batch(store, ANNA, count=50)
    add_batch(store, Caller("ben", "ben", 2.0), count=50)
    running = []
    for _ in range(30):
        running.append(asyncio.run(store.batches.next_line(running)))
    owners = [line.caller.owner for line in running]
    assert (owners.count("anna"), owners.count("ben")) == (10, 20)
    assert len({line.key for line in running}) == 30


# Each line has one result.


def test_a_result_is_written_once(opened):
    store = opened()
    batch = add_batch(store, count=2)
    line = asyncio.run(store.batches.next_line([]))
    for result in ("first", "second"):
        asyncio.run(store.batches.write_result(line, result, True))
    found = asyncio.run(store.batches.find(batch.id, "anna"))
    assert (found.completed, found.ended) == (1, None)
    assert asyncio.run(_all(store.batches.results(batch.id))) == ["first"]


def test_a_result_that_comes_too_late_is_dropped(opened):
    store = opened()
    batch = add_batch(store)
    line = asyncio.run(store.batches.next_line([]))
    asyncio.run(store.batches.delete_file(batch.output_file, "anna"))
    asyncio.run(store.batches.write_result(line, "late", True))
    while asyncio.run(store.batches.purge()):
        pass
    count = store.database.call(lambda c: c.execute("SELECT COUNT(*) FROM lines").fetchone()[0])
    assert count == 0


def test_cancelling_twice_changes_nothing(opened):
    store = opened()
    batch = add_batch(store)
    first, second = (asyncio.run(store.batches.cancel(batch.id, "anna")) for _ in range(2))
    assert first == second
    assert first.is_cancelled
    assert asyncio.run(store.batches.next_line([])) is None


def test_a_file_can_go_while_its_batch_runs(opened):
    store = opened()
    batch = add_batch(store)
    assert asyncio.run(store.batches.delete_file(batch.input_file, "anna"))
    assert asyncio.run(store.batches.next_line([])) is not None


def test_a_deleted_batch_leaves_nothing(opened, tmp_path):
    store = opened(tmp_path)
    batch = add_batch(store, count=200)
    asyncio.run(store.batches.delete_file(batch.output_file, "anna"))
    asyncio.run(store.batches.delete_file(batch.input_file, "anna"))
    while asyncio.run(store.batches.purge()):
        pass
    tables = ("files", "uploads", "batches", "lines", "trash")
    for table in tables:
        query = f"SELECT COUNT(*) FROM {table}"  # noqa: S608, a name from the line above
        assert store.database.call(lambda c, q=query: c.execute(q).fetchone()[0]) == 0, table


# A full disk.


def test_on_a_full_disk_reading_and_deleting_go_on(opened, tmp_path):
    store = opened(tmp_path)
    batch = add_batch(store)
    limit_pages(store, 2)
    with pytest.raises(StorageFullError):
        asyncio.run(store.batches.add_file("anna", "a", bytes(1_000_000)))
    assert store.database.is_full
    assert store.problem is None
    assert asyncio.run(store.batches.read_file(batch.input_file, "anna")) == b"lines"
    assert asyncio.run(store.batches.delete_file(batch.output_file, "anna"))
    limit_pages(store, None)
    asyncio.run(store.batches.add_file("anna", "a", bytes(1_000_000)))
    assert not store.database.is_full


def test_a_result_waits_for_room_with_one_log_line(opened, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(database, "LAST_PAUSE", 0.02)
    store = opened(tmp_path)
    batch = add_batch(store, count=1)
    line = asyncio.run(store.batches.next_line([]))
    limit_pages(store, 0)

    async def write() -> None:
        result = json.dumps({"audio": "x" * 100_000})
        writing = asyncio.create_task(store.batches.write_result(line, result, True))
        await asyncio.sleep(0.5)
        assert not writing.done()
        assert store.database.num_failures > 5
        await asyncio.to_thread(limit_pages, store, None)
        await asyncio.wait_for(writing, 5)

    with caplog.at_level(logging.ERROR):
        asyncio.run(write())
    assert [record.message for record in caplog.records] == [
        "the disk of --data is full: batches and jobs wait for room"
    ]
    assert asyncio.run(store.batches.find(batch.id, "anna")).completed == 1


def test_a_failed_transaction_leaves_nothing(opened, tmp_path):
    store = opened(tmp_path)
    limit_pages(store, 3)
    with pytest.raises(StorageFullError):
        asyncio.run(store.batches.add_batch(ANNA, [BODY] * 50_000, None, None, b"x"))
    assert asyncio.run(store.batches.list("anna", None, 9)).rows == []
    assert asyncio.run(store.batches.list_files("anna", None, 9)).rows == []


# How much one owner can store.


def test_an_owner_cannot_fill_the_others_room(opened):
    store = opened(stored_bytes=2_000_000, stored_bytes_per_owner=300_000)
    for _ in range(3):
        asyncio.run(store.batches.add_file("anna", "a", bytes(100_000)))
    with pytest.raises(QuotaError):
        asyncio.run(store.batches.add_file("anna", "a", b"a"))
    asyncio.run(store.batches.add_file("ben", "a", bytes(100_000)))


def test_results_count_for_their_owner(opened):
    """Whose batches wait until something is deleted, and nobody else's."""
    store = opened(stored_bytes_per_owner=50_000)
    mine, other = add_batch(store, ANNA), add_batch(store, BEN)
    line = asyncio.run(store.batches.next_line([]))
    assert line.batch == mine.id
    asyncio.run(store.batches.write_result(line, "x" * 60_000, True))
    assert asyncio.run(store.batches.next_line([])).batch == other.id
    asyncio.run(store.batches.cancel(other.id, "ben"))
    assert asyncio.run(store.batches.next_line([])) is None


@pytest.mark.parametrize(
    ("limits", "add"),
    [
        ({"files_per_owner": 2}, lambda s, o: asyncio.run(s.batches.add_file(o, "a", b"a"))),
        ({"batches_per_owner": 2}, lambda s, o: add_batch(s, Caller(o, o))),
        (
            {"voices_per_owner": 2},
            lambda s, o: s.voices.put(VoiceRow(o, str(len(s.voices.names())), 0, "a", b"a")),
        ),
    ],
)
def test_an_owner_has_a_limited_number_of_things(opened, limits, add):
    store = opened(**limits)
    for _ in range(2):
        add(store, "anna")
    with pytest.raises(QuotaError, match="2"):
        add(store, "anna")
    add(store, "ben")


# Downloads.


def test_downloads_end_with_their_time_whatever_the_clock_does(opened, monkeypatch):
    store = opened()
    file = asyncio.run(store.downloads.add("anna", b"a", "audio/wav", "wav"))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert asyncio.run(store.downloads.find(file.name)).data == b"a"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3601)
    assert asyncio.run(store.downloads.find(file.name)) is None
    asyncio.run(store.downloads.expire())


def test_an_owners_downloads_make_room_for_themselves_only(opened):
    store = opened(download_bytes=1000, download_bytes_per_owner=300)
    other = asyncio.run(store.downloads.add("ben", bytes(100), "audio/wav", "wav"))
    names = [
        asyncio.run(store.downloads.add("anna", bytes(100), "audio/wav", "wav")).name
        for _ in range(10)
    ]
    kept = [name for name in names if asyncio.run(store.downloads.find(name))]
    assert kept == names[-3:]
    assert asyncio.run(store.downloads.find(other.name))
    assert len({len(name) for name in names}) == 1
    assert len(names[0]) == 24 + len(".wav")


# What is stored costs those who ask for something else nothing.


def steps(store: Store, ask: Callable[[], Coroutine]) -> int:
    """How many instructions SQLite runs for a call."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    store.database.call(lambda connection: connection.set_progress_handler(tick, 1))
    asyncio.run(ask())
    store.database.call(lambda connection: connection.set_progress_handler(None, 1))
    return count


def test_50_000_pending_lines_cost_no_more_than_50(opened):
    costs = []
    for count in (50, 50_000):
        store = opened()
        batch = add_batch(store, count=count)
        line = asyncio.run(store.batches.next_line([]))
        calls = [
            lambda b=store.batches, n=batch.id: b.find(n, "anna"),
            lambda b=store.batches: b.list("anna", None, 100),
            lambda b=store.batches: b.list_files("anna", None, 100),
            lambda b=store.batches, line=line: b.next_line([line]),
            lambda b=store.batches, line=line: b.write_result(line, "a", True),
            lambda b=store.batches: b.add_file("anna", "a", b"a"),
            lambda b=store.batches, n=batch.id: b.cancel(n, "anna"),
            lambda b=store.batches, n=batch.output_file: b.delete_file(n, "anna"),
            lambda b=store.batches: b.purge(),
        ]
        costs.append([steps(store, call) for call in calls])
    few, many = costs
    assert all(more < 1.2 * less + 50 for less, more in zip(few, many, strict=True)), costs


def test_sql_runs_in_one_thread_beside_the_event_loop(opened, tmp_path):
    store = opened(tmp_path)
    threads = set()

    def note(_: str) -> None:
        threads.add(threading.current_thread().name)

    store.database.call(lambda connection: connection.set_trace_callback(note))

    async def work() -> None:
        batches, jobs = store.batches, store.jobs
        batch = await batches.add_batch(ANNA, [BODY], None, None, b"x")
        await batches.list("anna", None, 1)
        await batches.write_result(await batches.next_line([]), "a", True)
        assert [each async for each in batches.results(batch.id)] == ["a"]
        await jobs.unfinished()
        await store.downloads.add("anna", b"a", "audio/wav", "wav")

    asyncio.run(work())
    assert len(threads) == 1
    assert threading.current_thread().name not in threads
