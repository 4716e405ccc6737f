"""One tenant that occupies queues, slots, connections and storage."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable

import httpx

from attacks.registry import Server, attack
from attacks.speech import quiet_recording
from attacks.target import BrokeError, Target, add_voice, count_statuses

_SCENE = {"scene": [{"text": "one two three " * 40}] * 4}
_SHORT = {"scene": [{"text": "one"}], "max_audio_length_ms": 160}
_PATIENCE_SECONDS = 20


@attack(Server.KEYS)
async def jobs_of_one_tenant(target: Target) -> str:
    """Adds 200 jobs of four long lines by one tenant, then another's short job."""
    async with target.client(0) as greedy, target.client(1) as other:
        statuses, jobs = [], []
        for _ in range(200):
            response = await greedy.post("/queue/fal-ai/csm-1b", json=_SCENE)
            statuses.append(response.status_code)
            jobs += [response.json()["request_id"]] if response.is_success else []
        try:
            seconds = await _job(other)
        finally:
            for job in jobs:
                await greedy.put(f"/queue/fal-ai/csm-1b/requests/{job}/cancel")
    return f"{count_statuses(statuses)}; the other's took {seconds:.1f} s"


async def _job(client: httpx.AsyncClient) -> float:
    """Seconds until a short job has ended."""
    started = time.monotonic()
    response = await client.post("/queue/fal-ai/csm-1b", json=_SHORT)
    if not response.is_success:
        raise BrokeError(f"another tenant's job is refused: {response.status_code}")
    where = f"/queue/fal-ai/csm-1b/requests/{response.json()['request_id']}/status"
    await _wait(client, where, lambda status: status == "COMPLETED", "job")
    return time.monotonic() - started


async def _wait(
    client: httpx.AsyncClient, path: str, is_over: Callable[[str], bool], what: str
) -> float:
    """Seconds until the status at a path is final, for another tenant."""
    started = time.monotonic()
    while not is_over((await client.get(path)).json()["status"]):
        if time.monotonic() > started + _PATIENCE_SECONDS:
            raise BrokeError(f"another tenant's {what} takes more than {_PATIENCE_SECONDS} s")
        await asyncio.sleep(0.2)
    return time.monotonic() - started


@attack(Server.KEYS)
async def voices_of_one_tenant(target: Target) -> str:
    """Adds 80 voices of 20 s by one tenant, then one of another tenant."""
    audio = quiet_recording(20)
    statuses, names = [], [f"flood{number}" for number in range(80)]
    async with target.client(0) as greedy, target.client(1) as other:
        for name in names:
            statuses.append((await add_voice(greedy, name, audio)).status_code)
        mine = (await add_voice(other, "mine", quiet_recording(3))).status_code
        for name in names:
            await greedy.delete(f"/v1/audio/voices/{name}")
        await other.delete("/v1/audio/voices/mine")
    counts = count_statuses(statuses)
    if mine >= 400:
        raise BrokeError(f"{counts}; another tenant's voice is refused with {mine}")
    if max(statuses) < 400:
        raise BrokeError("80 voices and no end")
    return f"{counts}; another tenant's is added"


@attack(Server.KEYS)
async def batches_of_one_tenant(target: Target) -> str:
    """Adds files and batches of 50 000 lines until one is refused, then another's batch of one."""
    body = {"model": "csm-1b", "input": "one", "voice": "0", "max_audio_length_ms": 160}
    line = {"method": "POST", "url": "/v1/audio/speech", "body": body}
    many = b"\n".join(
        json.dumps({"custom_id": str(number), **line}).encode() for number in range(50_000)
    )
    statuses, made = [], []
    async with target.client(0) as greedy, target.client(1) as other:
        for _ in range(10):
            response, batch = await _batch(greedy, many)
            statuses.append(response)
            made += [batch] if batch else []
        one = json.dumps({"custom_id": "one", **line}).encode()
        mine, batch = await _batch(other, one)
        seconds = 0.0
        if batch:
            path = f"/v1/batches/{batch}"
            seconds = await _wait(other, path, lambda status: status != "in_progress", "batch")
        for batch in made:
            await greedy.post(f"/v1/batches/{batch}/cancel")
    counts = count_statuses(statuses)
    if mine >= 400:
        raise BrokeError(f"{counts}; another tenant's batch is refused with {mine}")
    return f"{counts}; the other's took {seconds:.1f} s"


async def _batch(client: httpx.AsyncClient, lines: bytes) -> tuple[int, str | None]:
    """Adds a batch; returns the status of the response and its name."""
    file = {"file": ("a.jsonl", lines)}
    response = await client.post("/v1/files", data={"purpose": "batch"}, files=file)
    if not response.is_success:
        return response.status_code, None
    batch = {"endpoint": "/v1/audio/speech", "completion_window": "24h"}
    batch["input_file_id"] = response.json()["id"]
    response = await client.post("/v1/batches", json=batch)
    return response.status_code, response.json().get("id")


@attack(Server.KEYS)
async def sockets_of_one_tenant(target: Target) -> str:
    """Opens 1000 WebSockets of one tenant from ten addresses, each with a sentence."""
    sockets = []

    async def one(number: int) -> None:
        with contextlib.suppress(Exception):
            address = (f"127.2.0.{number % 10 + 1}", 0)
            socket = await target.socket(0, local_addr=address)
            sockets.append(socket)
            await socket.send('{"type":"text","text":"One two three four five six seven. One."}')

    for start in range(0, 1000, 50):
        await asyncio.gather(*(one(number) for number in range(start, start + 50)))
    async with target.socket(1) as other, asyncio.timeout(_PATIENCE_SECONDS):
        await other.send('{"type":"session","max_audio_length_ms":160}')
        await other.send('{"type":"text","text":"One. Two."}')
        while not isinstance(await other.recv(), bytes):
            pass
    for socket in sockets:
        socket.transport.abort()
    return f"{len(sockets)} opened; another tenant's speaks"


@attack(Server.KEYS, floods=False)
async def unfinished_messages_of_one_tenant(target: Target) -> str:
    """Sends halves of large messages on 40 WebSockets, then another tenant's recording."""
    size, sockets = 13_000_000, []
    head = bytes([0x81, 0xFF]) + size.to_bytes(8, "big") + bytes(4)
    for _ in range(40):
        with contextlib.suppress(Exception):
            socket = await target.socket(0)
            sockets.append(socket)
            socket.transport.write(head + b" " * (size - 1000))
    await asyncio.sleep(5)
    turn = {"type": "turn", "speaker": 0, "text": "one", "x": "a" * 2_000_000}
    try:
        async with target.socket(1) as other, asyncio.timeout(_PATIENCE_SECONDS):
            await other.send(json.dumps(turn))
            response = json.loads(await other.recv())
    finally:
        for socket in sockets:
            socket.transport.abort()
    if response["type"] != "turn":
        raise BrokeError(f"another tenant's message is refused: {response}")
    return f"{len(sockets)} opened; another tenant's message is received"


@attack(Server.KEYS, floods=False)
async def webhooks_of_one_tenant(target: Target) -> str:
    """Requests 150 webhooks of one tenant to refused addresses, then another tenant's."""
    body = {"text": "one", "max_audio_length_ms": 160, "webhook": "http://127.0.0.1:9/"}
    path, statuses = "/v1/inference/sesame/csm-1b", []
    async with target.client(0) as greedy, target.client(1) as other:
        for _ in range(150):
            statuses.append((await greedy.post(path, json=body)).status_code)
            if statuses[-1] == 429:
                await asyncio.sleep(0.1)
        mine = (await other.post(path, json=body | {"webhook": "http://192.0.2.1/"})).status_code
    if mine == 429:
        raise BrokeError(f"{count_statuses(statuses)}; another tenant's is refused")
    return f"{count_statuses(statuses)}; another tenant's {mine}"
