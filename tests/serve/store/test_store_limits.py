"""A store on a full disk, and the storage limits of owners."""

import asyncio
import json
import logging
import time

import pytest
from stores import ANNA, BEN, LINE, add_batch, limit_pages

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import QuotaError, StorageFullError
from csm_jax.serve.store import database
from csm_jax.serve.store import store as store_module
from csm_jax.serve.store.batches import NewLine
from csm_jax.serve.store.voices import VoiceRow

# A full disk.


def test_reading_and_deleting_work_on_a_full_disk(open_store, tmp_path):
    store = open_store(tmp_path)
    batch = add_batch(store)
    limit_pages(store, 2)
    with pytest.raises(StorageFullError):
        asyncio.run(store.batches.add_file("anna", "a", bytes(1_000_000)))
    assert store.database.is_full
    assert store.problem is None
    assert store.batches.read_file(batch.input_file, "anna") == b"lines"
    assert asyncio.run(store.batches.delete_file(batch.output_file, "anna"))
    limit_pages(store, None)
    asyncio.run(store.batches.add_file("anna", "a", bytes(1_000_000)))
    assert not store.database.is_full


def test_a_result_waits_for_room_with_one_log_line(open_store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(database, "LAST_PAUSE", 0.02)
    store = open_store(tmp_path)
    batch = add_batch(store, count=1)
    line = asyncio.run(store.batches.next_line([]))
    limit_pages(store, 0)

    async def write() -> None:
        result = json.dumps({"audio": "x" * 100_000})
        writing = asyncio.create_task(store.batches.write_result(line, result, True))
        async with asyncio.timeout(30):
            while store.database.num_failures <= 5:
                await asyncio.sleep(0.01)
        assert not writing.done()
        await asyncio.to_thread(limit_pages, store, None)
        await asyncio.wait_for(writing, 30)

    with caplog.at_level(logging.ERROR):
        asyncio.run(write())
    assert [record.message for record in caplog.records] == [
        "the disk of --data is full: batches and jobs wait for room"
    ]
    assert asyncio.run(store.batches.find(batch.id, "anna")).completed == 1


def test_a_failed_transaction_leaves_no_rows(open_store, tmp_path):
    store = open_store(tmp_path)
    limit_pages(store, 3)
    with pytest.raises(StorageFullError):
        store.batches.add_batch(ANNA, [LINE] * 50_000, None, None, b"x")
    assert asyncio.run(store.batches.list("anna", None, 9)).rows == []
    assert asyncio.run(store.batches.list_files("anna", None, 9)).rows == []


# Limits per owner.


def test_an_owner_cannot_fill_the_storage_of_others(open_store):
    store = open_store(stored_bytes=2_000_000, stored_bytes_per_owner=300_000)
    for _ in range(3):
        asyncio.run(store.batches.add_file("anna", "a", bytes(100_000)))
    with pytest.raises(QuotaError):
        asyncio.run(store.batches.add_file("anna", "a", b"a"))
    asyncio.run(store.batches.add_file("ben", "a", bytes(100_000)))


def test_results_count_towards_the_storage_of_their_owner(open_store):
    """Batches of that owner wait for deletions, those of others run."""
    store = open_store(stored_bytes_per_owner=50_000)
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
def test_the_number_of_rows_of_an_owner_is_limited(open_store, limits, add):
    store = open_store(**limits)
    for _ in range(2):
        add(store, "anna")
    with pytest.raises(QuotaError, match="2"):
        add(store, "anna")
    add(store, "ben")


# Downloads.


def test_downloads_expire_even_if_the_clock_is_set_back(open_store, monkeypatch):
    store = open_store()
    file = asyncio.run(store.downloads.add("anna", b"a", "audio/wav", "wav"))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    found = asyncio.run(store.downloads.find(file.name))
    assert found == file
    assert asyncio.run(anext(store.downloads.read(found))) == b"a"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3601)
    assert asyncio.run(store.downloads.find(file.name)) is None
    asyncio.run(store.downloads.expire())


def test_downloads_of_an_owner_do_not_displace_those_of_others(open_store):
    store = open_store(download_bytes=1000, download_bytes_per_owner=300)
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


# Deleted rows.


def test_deleted_rows_count_until_they_are_removed(open_store):
    """Repeated adding and deleting stores no more than the limit."""
    store = open_store(stored_bytes_per_owner=1_000_000)
    lines = [NewLine(str(i), "x" * 10_000) for i in range(60)]
    batch = store.batches.add_batch(ANNA, lines, None, None, b"")
    asyncio.run(store.batches.delete_file(batch.output_file, "anna"))
    with pytest.raises(QuotaError):
        store.batches.add_batch(ANNA, lines, None, None, b"")
    store.batches.add_batch(BEN, lines, None, None, b"")
    while asyncio.run(store.batches.purge()):
        pass
    store.batches.add_batch(ANNA, lines, None, None, b"")


def test_repeated_adding_and_deleting_stays_within_the_total(open_store):
    store = open_store(stored_bytes=2_000_000)
    anybody, added = Caller(), 0
    lines = [NewLine(str(i), "x" * 10_000) for i in range(60)]
    for _ in range(10):
        try:
            batch = store.batches.add_batch(anybody, lines, None, None, b"")
        except QuotaError:
            break
        added += 1
        asyncio.run(store.batches.delete_file(batch.output_file, ""))
    pages = store.database.call(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
    assert 4096 * pages < 3_000_000
    assert added == 3


def test_one_of_several_owners_can_fill_a_quarter_of_the_total(open_store):
    store = open_store(stored_bytes=4_000_000)
    for owner, most in (("anna", 1_000_000), ("ben", 1_000_000)):
        with pytest.raises(QuotaError):
            asyncio.run(store.batches.add_file(owner, "a", bytes(most + 1)))
        asyncio.run(store.batches.add_file(owner, "a", bytes(most)))
    asyncio.run(store.batches.add_file("", "a", bytes(1_500_000)))


def test_tidying_continues_after_an_error(open_store, monkeypatch, caplog):
    monkeypatch.setattr(store_module, "_TIDY_SECONDS", 0.01)
    store, seen = open_store(), []

    async def fail() -> bool:
        seen.append(store.problem)
        if len(seen) < 3:
            raise RuntimeError("a bug")
        return False

    async def work() -> None:
        monkeypatch.setattr(store.batches, "purge", fail)
        tidying = asyncio.create_task(store.tidy())
        async with asyncio.timeout(5):
            while len(seen) < 5:
                await asyncio.sleep(0.01)
        tidying.cancel()

    asyncio.run(work())
    assert "a bug" in seen[1]
    assert seen[-1] is None
    assert [record.exc_info is not None for record in caplog.records] == [True]
