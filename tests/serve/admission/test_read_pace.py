"""Readers that are too slow are dropped; what waits for all together is bounded."""

import asyncio
import logging

from csm_jax.serve.admission import read_pace as readers
from csm_jax.serve.admission.read_pace import Readers
from csm_jax.serve.settings import Limits

LIMITS = Limits(unread_seconds=100.0, read_pace=0.1, read_pace_seconds=60.0)


class Reader:
    def __init__(self, name: str = "r", unread: float = 0.0):
        self.name = name
        self.unread_seconds = unread
        self.taken_seconds = 0.0
        self.is_dropped = False

    def drop(self) -> None:
        self.is_dropped = True


class Scene:
    """Readers, and a clock that a test sets."""

    def __init__(self):
        self.now = 0.0
        self.readers = Readers(LIMITS, lambda: self.now)

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.readers.check()


def test_a_reader_that_never_reads_is_dropped(caplog):
    scene, reader = Scene(), Reader("request-7", 20.0)
    scene.readers.add(reader)
    scene.pass_time(59)
    assert not reader.is_dropped
    with caplog.at_level(logging.WARNING):
        scene.pass_time(2)
    assert reader.is_dropped
    (line,) = caplog.messages
    assert "request-7" in line


def test_a_reader_slower_than_the_pace_is_dropped():
    scene, reader = Scene(), Reader(unread=20.0)
    scene.readers.add(reader)
    for _ in range(3):
        reader.taken_seconds += 0.001
        scene.pass_time(29)
    assert reader.is_dropped


def test_a_reader_at_playing_speed_is_not_dropped():
    """Nor is one whose speech has not been generated yet."""
    scene, player, waiting = Scene(), Reader(unread=90.0), Reader()
    scene.readers.add(player)
    scene.readers.add(waiting)
    for _ in range(300):
        player.taken_seconds += 0.5
        scene.pass_time(1)
    assert not player.is_dropped
    assert not waiting.is_dropped


def test_the_slowest_reader_is_dropped_when_too_much_waits():
    scene = Scene()
    readers = [Reader(str(number), unread) for number, unread in enumerate((30, 50, 40))]
    for reader in readers:
        scene.readers.add(reader)
    scene.pass_time(1)
    assert [reader.is_dropped for reader in readers] == [False, True, False]


def test_a_removed_reader_is_not_dropped():
    scene, reader = Scene(), Reader(unread=1000.0)
    scene.readers.add(reader)
    scene.readers.remove(reader)
    scene.readers.remove(reader)
    scene.pass_time(100)
    assert not reader.is_dropped


def test_checking_goes_on_after_an_error(monkeypatch, caplog):
    monkeypatch.setattr(readers, "_CHECK_SECONDS", 0.01)
    every, calls = Readers(Limits()), []

    def fail() -> None:
        calls.append(None)
        if len(calls) < 4:
            raise RuntimeError("a bug")

    async def work() -> None:
        monkeypatch.setattr(every, "check", fail)
        running = asyncio.create_task(every.run())
        async with asyncio.timeout(5):
            while len(calls) < 6:
                await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(work())
    assert len(caplog.records) == 1
