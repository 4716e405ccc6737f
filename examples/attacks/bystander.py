"""A well-behaved client beside an attack, in another process and with another address."""

import asyncio
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

from attacks.target import BYSTANDER, Target

# Size of a wav file's header.
_HEAD_BYTES = 44
_SHORT = {"text": "one", "seed": 1, "max_audio_length_ms": 400, "streaming": True}
_PAUSE_SECONDS = 0.5
_TIMEOUT = 40.0


@dataclass
class Experience:
    """Measurements of the bystander.

    Attributes:
      probe_s: seconds of each response of /healthz and /readyz.
      first_s: seconds to the first samples of each short stream.
      failures: requests without a response, or with another status than 200.
    """

    probe_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        found = {"probe_max_s": max(self.probe_s, default=0.0)}
        if self.first_s:
            found["first_p50_s"] = statistics.median(self.first_s)
            found["first_max_s"] = max(self.first_s)
        return {name: round(value, 2) for name, value in found.items()}


@contextlib.contextmanager
def watching(target: Target) -> Iterator[Experience]:
    """Sends probes and short texts until the block ends; then the result is filled in."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (target.url, target.headers(-1), theirs)
    process = context.Process(target=_watch, args=arguments, daemon=True)
    process.start()
    ours.recv()  # it has started
    experience = Experience()
    try:
        yield experience
    finally:
        ours.send("stop")
        if ours.poll(2 * _TIMEOUT):
            experience.__dict__.update(ours.recv().__dict__)
        else:
            experience.failures.append("the bystander was never answered")
        process.kill()
        process.join()


def _watch(url: str, headers: dict[str, str], pipe: object) -> None:
    asyncio.run(_watch_all(url, headers, pipe))


async def _watch_all(url: str, headers: dict[str, str], pipe: object) -> None:
    experience = Experience()
    transport = httpx.AsyncHTTPTransport(local_address=BYSTANDER)
    more = dict(base_url=url, headers=headers, transport=transport, timeout=_TIMEOUT)
    async with httpx.AsyncClient(**more) as client:
        pipe.send("begun")
        while not pipe.poll():
            await asyncio.gather(
                _probe(client, "/healthz", experience),
                _probe(client, "/readyz", experience),
                _listen(client, experience),
            )
            await asyncio.sleep(_PAUSE_SECONDS)
    pipe.send(experience)


async def _probe(client: httpx.AsyncClient, path: str, experience: Experience) -> None:
    started = time.perf_counter()
    try:
        response = await client.get(path, headers={"Connection": "close"})
        if response.status_code != 200:
            experience.failures.append(f"{path} {response.status_code}")
    except httpx.HTTPError as error:
        experience.failures.append(f"{path} {type(error).__name__}")
    experience.probe_s.append(time.perf_counter() - started)


async def _listen(client: httpx.AsyncClient, experience: Experience) -> None:
    started, num_bytes, first = time.perf_counter(), 0, None
    try:
        async with client.stream("POST", "/generate", json=_SHORT) as response:
            response.raise_for_status()
            async for piece in response.aiter_raw():
                num_bytes += len(piece)
                if first is None and num_bytes > _HEAD_BYTES:
                    first = time.perf_counter() - started
    except httpx.HTTPStatusError as error:
        experience.failures.append(f"speech {error.response.status_code}")
    except httpx.HTTPError as error:
        experience.failures.append(f"speech {type(error).__name__}")
    experience.first_s.append(first or time.perf_counter() - started)
