"""Clients and their connections take turns, for a part of each round of the event loop."""

import asyncio
import time
from dataclasses import dataclass, field

from csm_jax.serve.transport.input_scheduler import InputScheduler


@dataclass(eq=False)
class Receiver:
    """A fake connection with pieces of so many seconds, which records its turns."""

    share: str | None
    name: str
    scheduler: InputScheduler
    fed: list[str]
    pieces: int = 1
    seconds: float = 0.0

    def feed(self) -> None:
        time.sleep(self.seconds)
        self.fed.append(self.name)
        self.pieces -= 1
        if self.pieces:
            self.scheduler.add(self)


class BrokenReceiver:
    share = "broken"

    def feed(self) -> None:
        raise RuntimeError


@dataclass
class Scheduled:
    scheduler: InputScheduler = field(default_factory=InputScheduler)
    fed: list[str] = field(default_factory=list)

    def add(self, share: str | None, name: str, pieces: int = 1, seconds: float = 0.0) -> None:
        self.scheduler.add(Receiver(share, name, self.scheduler, self.fed, pieces, seconds))


def test_clients_take_turns_and_so_do_the_connections_of_each():
    async def work() -> str:
        made = Scheduled()
        for name in "abc":
            made.add("many", name, pieces=2)
        made.add("one", "x", pieces=2)
        await asyncio.sleep(0.05)
        return "".join(made.fed)

    assert asyncio.run(work()) == "axbxcabc"


def test_each_connection_of_a_proxy_has_its_own_turns():
    async def work() -> str:
        made = Scheduled()
        made.add(None, "a", pieces=2)
        made.add(None, "b", pieces=2)
        made.add("one", "x", pieces=2)
        await asyncio.sleep(0.05)
        return "".join(made.fed)

    assert asyncio.run(work()) == "abxabx"


def test_the_turns_in_one_round_of_the_event_loop_are_limited():
    """Even if many connections have input; quick input is handed on in one round."""

    async def work() -> tuple[int, int]:
        slow, quick = Scheduled(), Scheduled()
        for number in range(20):
            slow.add("many", str(number), seconds=0.01)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first = len(slow.fed)
        for number in range(10):
            quick.add("many", str(number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return first, len(quick.fed)

    first, quick = asyncio.run(work())
    assert 1 <= first <= 2
    assert quick == 10


def test_an_error_of_one_connection_does_not_stop_the_others():
    async def work() -> list[str]:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        made = Scheduled()
        made.scheduler.add(BrokenReceiver())
        made.add("one", "x")
        await asyncio.sleep(0.05)
        return made.fed

    assert asyncio.run(work()) == ["x"]
