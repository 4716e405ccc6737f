"""Helpers that fill and limit the stores of tests."""

import sqlite3
from collections.abc import AsyncIterable

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.store import Store
from csm_jax.serve.store.batches import BatchRow, NewLine

ANNA, BEN = Caller("anna", "anna", 1.0), Caller("ben", "ben", 1.0)
LINE = NewLine("a", '{"custom_id": "a"}')


def add_batch(store: Store, caller: Caller = ANNA, count: int = 3) -> BatchRow:
    return store.batches.add_batch(caller, [LINE] * count, None, None, b"lines")


def limit_pages(store: Store, more: int | None) -> None:
    """Limits the growth of the database to so many pages of 4 kB; None is no limit."""

    def limit(connection: sqlite3.Connection) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        most = 2**30 if more is None else pages + more
        connection.execute(f"PRAGMA max_page_count = {most}").fetchall()

    store.database.call(limit)


async def collect(items: AsyncIterable) -> list:
    return [item async for item in items]
