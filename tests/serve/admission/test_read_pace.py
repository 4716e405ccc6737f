"""Clients that read too slowly are dropped, and unread speech is limited in total."""

import asyncio
import logging

from csm_jax.serve.admission import read_pace
from csm_jax.serve.admission.read_pace import ReadPaceMonitor
from csm_jax.serve.settings import Limits

LIMITS = Limits(unread_seconds=100.0, read_pace=0.1, read_pace_seconds=60.0)


class MonitoredStream:
    def __init__(self, name: str = "r", unread: float = 0.0):
        self.name = name
        self.unread_seconds = unread
        self.taken_seconds = 0.0
        self.is_dropped = False

    def drop(self) -> None:
        self.is_dropped = True


class Scene:
    """A monitor, and a clock that a test sets."""

    def __init__(self):
        self.now = 0.0
        self.monitor = ReadPaceMonitor(LIMITS, lambda: self.now)

    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.monitor.check()


def test_a_client_that_never_reads_is_dropped(caplog):
    scene, reader = Scene(), MonitoredStream("request-7", 20.0)
    scene.monitor.add(reader)
    scene.pass_time(59)
    assert not reader.is_dropped
    with caplog.at_level(logging.WARNING):
        scene.pass_time(2)
    assert reader.is_dropped
    (line,) = caplog.messages
    assert "request-7" in line


def test_a_client_slower_than_the_pace_is_dropped():
    scene, reader = Scene(), MonitoredStream(unread=20.0)
    scene.monitor.add(reader)
    for _ in range(3):
        reader.taken_seconds += 0.001
        scene.pass_time(29)
    assert reader.is_dropped


def test_a_client_at_playing_speed_is_not_dropped():
    """Nor is a client whose speech has not been generated yet."""
    scene, player, waiting = Scene(), MonitoredStream(unread=90.0), MonitoredStream()
    scene.monitor.add(player)
    scene.monitor.add(waiting)
    for _ in range(300):
        player.taken_seconds += 0.5
        scene.pass_time(1)
    assert not player.is_dropped
    assert not waiting.is_dropped


def test_the_slowest_client_is_dropped_when_too_much_is_unread():
    scene = Scene()
    readers = [MonitoredStream(str(number), unread) for number, unread in enumerate((30, 50, 40))]
    for reader in readers:
        scene.monitor.add(reader)
    scene.pass_time(1)
    assert [reader.is_dropped for reader in readers] == [False, True, False]


def test_a_removed_stream_is_not_dropped():
    scene, reader = Scene(), MonitoredStream(unread=1000.0)
    scene.monitor.add(reader)
    scene.monitor.remove(reader)
    scene.monitor.remove(reader)
    scene.pass_time(100)
    assert not reader.is_dropped


def test_checks_continue_after_an_error(monkeypatch, caplog):
    monkeypatch.setattr(read_pace, "_CHECK_SECONDS", 0.01)
    every, calls = ReadPaceMonitor(Limits()), []

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
