"""Batches and files of a store: owners, one result for each line, and constant cost."""

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Coroutine

import pytest
from stores import ANNA, LINE, add_batch, collect

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.store import Store
from csm_jax.serve.store.batches import NewLine

# Owners.


def test_rows_of_other_owners_are_not_found(open_store):
    store = open_store()
    batch = add_batch(store, ANNA)
    input_file, output_file = batch.input_file, batch.output_file

    async def look(owner: str) -> list:
        batches = store.batches
        found = [await batches.find(batch.id, owner), await batches.cancel(batch.id, owner)]
        for file in (input_file, output_file):
            found.append(await batches.find_file(file, owner))
        found.append(batches.read_file(input_file, owner))
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
def test_patterns_in_ids_match_nothing(open_store, name):
    store = open_store()
    add_batch(store)
    for find in (store.batches.find, store.batches.find_file):
        assert asyncio.run(find(name, "anna")) is None
    assert store.batches.read_file(name, "anna") is None
    assert asyncio.run(store.batches.delete_file(name, "anna")) is None


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_the_pages_of_a_list_are_complete(open_store, limit, monkeypatch):
    store = open_store()
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


def test_shares_take_turns_by_weight(open_store):
    store = open_store()
    add_batch(store, ANNA, count=50)
    add_batch(store, Caller("ben", "ben", 2.0), count=50)
    running = []
    for _ in range(30):
        running.append(asyncio.run(store.batches.next_line(running)))
    owners = [line.caller.owner for line in running]
    assert (owners.count("anna"), owners.count("ben")) == (10, 20)
    assert len({line.key for line in running}) == 30


# Each line has one result.


def test_a_result_is_written_once(open_store):
    store = open_store()
    batch = add_batch(store, count=2)
    line = asyncio.run(store.batches.next_line([]))
    for result in ("first", "second"):
        asyncio.run(store.batches.write_result(line, result, True))
    found = asyncio.run(store.batches.find(batch.id, "anna"))
    assert (found.completed, found.ended) == (1, None)
    assert asyncio.run(collect(store.batches.results(batch.id))) == ["first"]


def test_a_result_after_the_end_of_its_batch_is_dropped(open_store):
    store = open_store()
    batch = add_batch(store)
    line = asyncio.run(store.batches.next_line([]))
    asyncio.run(store.batches.delete_file(batch.output_file, "anna"))
    asyncio.run(store.batches.write_result(line, "late", True))
    while asyncio.run(store.batches.purge()):
        pass
    count = store.database.call(lambda c: c.execute("SELECT COUNT(*) FROM lines").fetchone()[0])
    assert count == 0


def test_cancelling_twice_changes_nothing(open_store):
    store = open_store()
    batch = add_batch(store)
    first, second = (asyncio.run(store.batches.cancel(batch.id, "anna")) for _ in range(2))
    assert first == second
    assert first.is_cancelled
    assert asyncio.run(store.batches.next_line([])) is None


def test_a_file_can_be_deleted_while_its_batch_runs(open_store):
    store = open_store()
    batch = add_batch(store)
    assert asyncio.run(store.batches.delete_file(batch.input_file, "anna"))
    assert asyncio.run(store.batches.next_line([])) is not None


def test_a_deleted_batch_leaves_no_rows(open_store, tmp_path):
    store = open_store(tmp_path)
    batch = add_batch(store, count=200)
    asyncio.run(store.batches.delete_file(batch.output_file, "anna"))
    asyncio.run(store.batches.delete_file(batch.input_file, "anna"))
    while asyncio.run(store.batches.purge()):
        pass
    tables = ("files", "uploads", "batches", "lines", "trash")
    for table in tables:
        query = f"SELECT COUNT(*) FROM {table}"  # noqa: S608, a name from the line above
        assert store.database.call(lambda c, q=query: c.execute(q).fetchone()[0]) == 0, table


# The cost of a query does not grow with the store.


def steps(store: Store, ask: Callable[[], Coroutine]) -> int:
    """The number of instructions that SQLite runs for a call."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    store.database.call(lambda connection: connection.set_progress_handler(tick, 1))
    asyncio.run(ask())
    store.database.call(lambda connection: connection.set_progress_handler(None, 1))
    return count


def test_50_000_pending_lines_cost_no_more_than_50(open_store):
    costs = []
    for count in (50, 50_000):
        store = open_store()
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
        ]
        costs.append([steps(store, call) for call in calls])
    few, many = costs
    assert all(more < 1.2 * less + 50 for less, more in zip(few, many, strict=True)), costs


def test_sql_runs_in_one_thread_outside_the_event_loop(open_store, tmp_path):
    store = open_store(tmp_path)
    threads = set()

    def note(_: str) -> None:
        threads.add(threading.current_thread().name)

    store.database.call(lambda connection: connection.set_trace_callback(note))

    async def work() -> None:
        batches, jobs = store.batches, store.jobs
        batch = batches.add_batch(ANNA, [LINE], None, None, b"x")
        await batches.list("anna", None, 1)
        await batches.write_result(await batches.next_line([]), "a", True)
        assert [each async for each in batches.results(batch.id)] == ["a"]
        await jobs.unfinished()
        await store.downloads.add("anna", b"a", "audio/wav", "wav")

    asyncio.run(work())
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


def test_lines_of_a_deleted_batch_are_removed_some_at_a_time(open_store):
    costs = []
    for count in (2000, 50_000):
        store = open_store()
        batch = add_batch(store, count=count)
        asyncio.run(store.batches.delete_file(batch.output_file, "anna"))
        costs.append(steps(store, store.batches.purge))
    assert costs[1] < 1.2 * costs[0] + 50


def test_large_lines_of_a_deleted_batch_are_removed_by_their_bytes(open_store):
    store = open_store()
    lines = [NewLine(str(i), "x" * 250_000) for i in range(100)]
    batch = store.batches.add_batch(ANNA, lines, None, None, b"")
    asyncio.run(store.batches.delete_file(batch.output_file, "anna"))
    asyncio.run(store.batches.purge())
    count = store.database.call(lambda c: c.execute("SELECT COUNT(*) FROM lines").fetchone()[0])
    assert 80 <= count < 100


def test_an_upload_is_read_in_pieces(open_store):
    store = open_store()
    for size in (0, 1, 1_000_000, 2_500_001):
        data = os.urandom(size)
        file = asyncio.run(store.batches.add_file("anna", "a", data))
        pieces = asyncio.run(collect(store.batches.read_upload(file)))
        assert b"".join(pieces) == data
        assert max(map(len, pieces), default=0) <= 1_000_000
