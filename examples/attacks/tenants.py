"""One tenant that takes what the others need: queues, rows, connections, room."""

import asyncio
import contextlib
import json
import time

import httpx

from attacks.registry import Server, attack
from attacks.speech import quiet_recording
from attacks.target import BrokeError, Target

_SCENE = {"scene": [{"text": "one two three " * 40}] * 4}
_SHORT = {"scene": [{"text": "one"}], "max_audio_length_ms": 160}
_PATIENCE_SECONDS = 20


def _counts(told: list[int]) -> str:
    return ", ".join(f"{kind}: {told.count(kind)}" for kind in sorted(set(told)))


@attack(Server.KEYS)
async def jobs_of_one_tenant(target: Target) -> str:
    """200 jobs of four long lines by one tenant; another's short job comes next."""
    async with target.client(0) as greedy, target.client(1) as other:
        told, jobs = [], []
        for _ in range(200):
            answer = await greedy.post("/queue/fal-ai/csm-1b", json=_SCENE)
            told.append(answer.status_code)
            jobs += [answer.json()["request_id"]] if answer.is_success else []
        try:
            seconds = await _job(other)
        finally:
            for job in jobs:
                await greedy.put(f"/queue/fal-ai/csm-1b/requests/{job}/cancel")
    return f"{_counts(told)}; the other's took {seconds:.1f} s"


async def _job(client: httpx.AsyncClient) -> float:
    """Seconds until a short job is over."""
    started = time.monotonic()
    answer = await client.post("/queue/fal-ai/csm-1b", json=_SHORT)
    if not answer.is_success:
        raise BrokeError(f"another tenant's job is refused: {answer.status_code}")
    where = f"/queue/fal-ai/csm-1b/requests/{answer.json()['request_id']}/status"
    while (await client.get(where)).json()["status"] != "COMPLETED":
        if time.monotonic() > started + _PATIENCE_SECONDS:
            raise BrokeError(f"another tenant's job takes more than {_PATIENCE_SECONDS} s")
        await asyncio.sleep(0.2)
    return time.monotonic() - started


@attack(Server.KEYS)
async def voices_of_one_tenant(target: Target) -> str:
    """80 voices of 20 s by one tenant; then one of another tenant."""
    audio = quiet_recording(20)
    told, names = [], [f"flood{number}" for number in range(80)]
    async with target.client(0) as greedy, target.client(1) as other:
        for name in names:
            told.append(await _add_voice(greedy, name, audio))
        mine = await _add_voice(other, "mine", quiet_recording(3))
        for name in names:
            await greedy.delete(f"/v1/audio/voices/{name}")
        await other.delete("/v1/audio/voices/mine")
    if mine >= 400:
        raise BrokeError(f"{_counts(told)}; another tenant's voice is refused with {mine}")
    if max(told) < 400:
        raise BrokeError("80 voices and no end")
    return f"{_counts(told)}; another tenant's is added"


async def _add_voice(client: httpx.AsyncClient, name: str, audio: bytes) -> int:
    form = {"name": name, "text": "one", "speaker": "0"}
    answer = await client.post("/v1/audio/voices", data=form, files={"audio": ("a.flac", audio)})
    return answer.status_code


@attack(Server.KEYS)
async def batches_of_one_tenant(target: Target) -> str:
    """Files of 50 000 lines and batches of them until they are refused; another's batch of one."""
    body = {"model": "csm-1b", "input": "one", "voice": "0", "max_audio_length_ms": 160}
    line = {"method": "POST", "url": "/v1/audio/speech", "body": body}
    many = b"\n".join(
        json.dumps({"custom_id": str(number), **line}).encode() for number in range(50_000)
    )
    told, made = [], []
    async with target.client(0) as greedy, target.client(1) as other:
        for _ in range(10):
            answer, batch = await _batch(greedy, many)
            told.append(answer)
            made += [batch] if batch else []
        one = json.dumps({"custom_id": "one", **line}).encode()
        mine, batch = await _batch(other, one)
        seconds = await _wait_for_batch(other, batch) if batch else 0.0
        for batch in made:
            await greedy.post(f"/v1/batches/{batch}/cancel")
    if mine >= 400:
        raise BrokeError(f"{_counts(told)}; another tenant's batch is refused with {mine}")
    return f"{_counts(told)}; the other's took {seconds:.1f} s"


async def _batch(client: httpx.AsyncClient, lines: bytes) -> tuple[int, str | None]:
    """The status of a new batch, and its name."""
    file = {"file": ("a.jsonl", lines)}
    answer = await client.post("/v1/files", data={"purpose": "batch"}, files=file)
    if not answer.is_success:
        return answer.status_code, None
    batch = {"endpoint": "/v1/audio/speech", "completion_window": "24h"}
    batch["input_file_id"] = answer.json()["id"]
    answer = await client.post("/v1/batches", json=batch)
    return answer.status_code, answer.json().get("id")


async def _wait_for_batch(client: httpx.AsyncClient, batch: str) -> float:
    started = time.monotonic()
    while (await client.get(f"/v1/batches/{batch}")).json()["status"] == "in_progress":
        if time.monotonic() > started + _PATIENCE_SECONDS:
            raise BrokeError(f"another tenant's line waits for more than {_PATIENCE_SECONDS} s")
        await asyncio.sleep(0.2)
    return time.monotonic() - started


@attack(Server.KEYS)
async def sockets_of_one_tenant(target: Target) -> str:
    """1000 WebSockets of one tenant from ten addresses, each with a sentence."""
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
async def webhooks_of_one_tenant(target: Target) -> str:
    """150 webhooks of one tenant to addresses that are refused; then another tenant's."""
    body = {"text": "one", "max_audio_length_ms": 160, "webhook": "http://127.0.0.1:9/"}
    path, told = "/v1/inference/sesame/csm-1b", []
    async with target.client(0) as greedy, target.client(1) as other:
        for _ in range(150):
            told.append((await greedy.post(path, json=body)).status_code)
            if told[-1] == 429:
                await asyncio.sleep(0.1)
        mine = (await other.post(path, json=body | {"webhook": "http://192.0.2.1/"})).status_code
    if mine == 429:
        raise BrokeError(f"{_counts(told)}; another tenant's is refused")
    return f"{_counts(told)}; another tenant's {mine}"
