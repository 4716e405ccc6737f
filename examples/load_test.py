"""Tests a server with many streams at once: whether and how soon their responses are correct.

    python -m csm_jax.serve --checkpoint=demo --max_batch=16 --max_queue=64 &
    python examples/load_test.py --streams=64 --requests=256 --pid=$!
    python examples/load_test.py --streams=64 --requests=2000 --leave=0.2 --pid=$!

The received part of every response is compared with the library's output for the same request.
The program prints a JSON object; the exit code is 1 if a response was lost or belonged to another
request.
"""

import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from absl import app, flags, logging

import csm_jax
from csm_jax.io.audio import to_pcm
from csm_jax.io.samples import SAMPLE_RATE

URL = flags.DEFINE_string("url", "http://127.0.0.1:8000", "the server")
CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "the server's checkpoint")
STREAMS = flags.DEFINE_integer("streams", 64, "streams at once")
REQUESTS = flags.DEFINE_integer("requests", 256, "number of requests")
DIFFERENT = flags.DEFINE_integer("different", 64, "number of different texts and seeds")
LEAVE = flags.DEFINE_float("leave", 0.0, "share of the clients that disconnect")
PATIENCE = flags.DEFINE_float("patience", 0.0, "seconds to repeat requests after a 429")
PID = flags.DEFINE_integer("pid", None, "process id of the server, for its memory")
SEED = flags.DEFINE_integer("seed", 0, "seed of the texts and the disconnects")

# Size of a wav file's header.
HEAD_BYTES = 44
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Outcome(NamedTuple):
    """The outcome of one request.

    Attributes:
      kind: "good", "lost", "mixed up" or "left".
      first_s: seconds until the first samples; None if the client disconnected before.
      seconds: seconds of speech.
    """

    kind: str
    first_s: float | None
    seconds: float


def draw_requests(count: int, seed: int) -> list[csm_jax.Request]:
    source = random.Random(seed)
    return [
        csm_jax.Request(" ".join(source.choices(WORDS, k=source.randint(1, 6))), i % 2, seed=i)
        for i in range(count)
    ]


async def ask(client: httpx.AsyncClient, request: csm_jax.Request, leave_after: int) -> tuple:
    """The samples of a response, and when they start; disconnects after `leave_after` bytes."""
    body = {"text": request.text, "speaker": request.speaker, "seed": request.seed}
    started, first, data = time.perf_counter(), None, b""
    url = f"{URL.value}/generate"
    async with client.stream("POST", url, json=body | {"streaming": True}) as response:
        response.raise_for_status()
        async for piece in response.aiter_raw():
            data += piece
            if first is None and len(data) > HEAD_BYTES:
                first = time.perf_counter() - started
            if len(data) > leave_after:
                break
    return np.frombuffer(data[HEAD_BYTES : len(data) // 2 * 2], "<i2"), first


async def ask_again(client: httpx.AsyncClient, request: csm_jax.Request, leave_after: int) -> tuple:
    """Does the same, and repeats the request after a response 429; the waiting time counts."""
    started = time.perf_counter()
    while True:
        waited = time.perf_counter() - started
        try:
            samples, first = await ask(client, request, leave_after)
            return samples, first and waited + first
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 429 or waited > PATIENCE.value:
                raise
            await asyncio.sleep(float(error.response.headers.get("Retry-After", 1)))


async def run_one(client: httpx.AsyncClient, request, expected: np.ndarray, leaves: int) -> Outcome:
    try:
        samples, first = await ask_again(client, request, leaves)
    except httpx.HTTPError as error:
        logging.error("%s: %r", request.text, error)
        return Outcome("lost", None, 0.0)
    left = leaves < 2 * len(expected)
    kind = "left" if left else "good"
    if not is_same(samples, expected[: len(samples)] if left else expected):
        kind = "mixed up"
    return Outcome(kind, first, len(samples) / SAMPLE_RATE)


def is_same(samples: np.ndarray, expected: np.ndarray) -> bool:
    # Chunks of different sizes are rounded differently in the last place.
    return len(samples) == len(expected) and np.abs(samples - expected).max(initial=0) <= 1


async def run_all(requests: list, expected: list[np.ndarray], memory: list) -> list[Outcome]:
    """Adds the server's memory at every quarter of the requests to `memory`."""
    source = random.Random(SEED.value)
    limit = asyncio.Semaphore(STREAMS.value)
    limits = httpx.Limits(max_connections=STREAMS.value)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def one(index: int) -> Outcome:
            known = index % len(requests)
            whole = 2 * len(expected[known])
            leaves = source.randrange(whole) if source.random() < LEAVE.value else whole + 10**9
            async with limit:
                if index % -(-REQUESTS.value // 4) == 0:
                    memory.append(memory_mb())
                return await run_one(client, requests[known], expected[known], leaves)

        return await asyncio.gather(*(one(index) for index in range(REQUESTS.value)))


def memory_mb() -> float | None:
    """Resident memory of the server in MB."""
    if PID.value is None:
        return None
    pages = int(Path(f"/proc/{PID.value}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def speak_alone(model: csm_jax.Generator, requests: list) -> tuple[list[np.ndarray], float]:
    """The library's output for each request alone, and seconds of speech a second."""
    expected = [as_int16(model.generate(request)) for request in requests]
    # Again, now that everything is compiled.
    started = time.perf_counter()
    seconds = sum(len(model.generate(request)) / SAMPLE_RATE for request in requests)
    return expected, seconds / (time.perf_counter() - started)


def as_int16(audio: np.ndarray) -> np.ndarray:
    return np.frombuffer(to_pcm(audio), "<i2").astype(np.int32)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    model = csm_jax.load(CHECKPOINT.value)
    requests = draw_requests(DIFFERENT.value, SEED.value)
    expected, alone = speak_alone(model, requests)
    memory, started = [], time.perf_counter()
    outcomes = asyncio.run(run_all(requests, expected, memory))
    elapsed = time.perf_counter() - started
    kinds = [outcome.kind for outcome in outcomes]
    first = [outcome.first_s for outcome in outcomes if outcome.first_s is not None]
    figures = {kind: kinds.count(kind) for kind in ("good", "left", "lost", "mixed up")}
    for share in (50, 95, 99):
        figures[f"first_audio_p{share}_s"] = round(float(np.percentile(first, share)), 3)
    figures["requests_a_second"] = round(len(outcomes) / elapsed, 2)
    figures["speech_a_second"] = round(sum(outcome.seconds for outcome in outcomes) / elapsed, 2)
    figures["alone_speech_a_second"] = round(alone, 2)
    figures["memory_at_quarters_mb"] = [*memory, memory_mb()]
    print(json.dumps(figures))
    raise SystemExit(bool(figures["lost"] or figures["mixed up"]))


if __name__ == "__main__":
    app.run(main)
