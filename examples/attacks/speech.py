"""Requests that occupy the engine."""

import asyncio
import base64
import contextlib
import io
import json
import time

import httpx

from attacks.registry import Server, attack
from attacks.target import (
    BYSTANDER,
    JSON_TYPE,
    LONG_TEXT,
    BrokeError,
    Target,
    closing,
    count_statuses,
)

# A gap of this length is audible.
_GAP_SECONDS = 1.0


def quiet_recording(seconds: float, rate: int = 24_000) -> bytes:
    """A long FLAC file of a few kB that is not silent."""
    import numpy as np
    import soundfile

    samples = np.zeros(int(seconds * rate), np.float32)
    samples[:: 5 * rate] = 0.5
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC")
    return file.getvalue()


@attack()
async def context_flood(target: Target) -> str:
    """Sends five scenes with 64 recordings of 59 s each; the clients disconnect after 20 s."""
    uri = "data:audio/flac;base64," + base64.b64encode(quiet_recording(59)).decode()
    context = [{"prompt": "one", "audio_url": uri}] * 64
    body = json.dumps({"scene": [{"text": "one"}], "context": context}).encode()

    async def ask() -> str:
        async with target.client() as client:
            try:
                response = await client.post(
                    "/fal-ai/csm-1b", content=body, headers=JSON_TYPE, timeout=20
                )
                return str(response.status_code)
            except httpx.TimeoutException:
                return "left"

    statuses = await asyncio.gather(*(ask() for _ in range(5)))
    await asyncio.sleep(15)
    return f"{len(body) / 1e6:.1f} MB each: {', '.join(statuses)}"


@attack()
async def turns_flood(target: Target) -> str:
    """Opens eight WebSockets that send 20 turns of 59 s each, and disconnect."""
    audio = base64.b64encode(quiet_recording(59)).decode()
    turn = json.dumps({"type": "turn", "speaker": 0, "text": "one", "audio": audio})

    async def send() -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with target.socket() as socket:
                for _ in range(20):
                    await socket.send(turn)
                await asyncio.sleep(3)

    await asyncio.gather(*(send() for _ in range(8)), return_exceptions=True)
    await asyncio.sleep(10)
    return "160 turns sent"


@attack()
async def first_long_text(target: Target) -> str:
    """Sends a first long text in a voice beside a stream whose longest gap is measured."""
    async with target.client() as client, target.client(address=BYSTANDER) as other:
        listening = asyncio.create_task(_longest_gap(other))
        await asyncio.sleep(1)
        body = {"text": LONG_TEXT[:1500], "voice": "slt", "max_audio_length_ms": 4000, "seed": 1}
        (await client.post("/generate", json=body)).raise_for_status()
        for speaker in (3, 4):
            await client.post(
                "/generate", json=body | {"speaker": speaker, "text": LONG_TEXT[:400]}
            )
        gap = await listening
    if gap > _GAP_SECONDS:
        raise BrokeError(f"the stream was silent for {gap:.1f} s")
    return f"longest gap {gap:.2f} s"


async def _longest_gap(client: httpx.AsyncClient) -> float:
    """The longest gap in the playback of a long stream; audio that was sent early counts."""
    gap, ahead, last = 0.0, 0.0, None
    body = {"text": LONG_TEXT[:1500], "streaming": True, "seed": 2, "max_audio_length_ms": 60_000}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(40), client.stream("POST", "/generate", json=body) as response:
            async for piece in response.aiter_raw():
                now = time.monotonic()
                if last is not None:
                    ahead -= now - last
                    gap = max(gap, -ahead)
                    ahead = max(ahead, 0.0)
                ahead, last = ahead + len(piece) / 48_000, now
    return gap


@attack()
async def long_texts(target: Target) -> str:
    """Sends 24 texts of 10 000 characters from one address, beside the bystander."""
    async with target.client() as client:
        tasks = [
            asyncio.create_task(client.post("/generate", json={"text": LONG_TEXT, "seed": seed}))
            for seed in range(24)
        ]
        await asyncio.sleep(25)
        for task in tasks:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
    answered = [response.status_code for response in done if isinstance(response, httpx.Response)]
    return f"{len(tasks) - len(answered)} spoke or waited, {len(answered)} were refused"


@attack()
async def short_texts_of_one(target: Target) -> str:
    """Sends 300 short texts at once from one address."""
    async with target.client() as client:
        body = {"text": "one two three", "max_audio_length_ms": 2000}

        async def ask() -> str:
            with contextlib.suppress(httpx.HTTPError):
                return str((await client.post("/generate", json=body)).status_code)
            return "closed"

        statuses = await asyncio.gather(*(ask() for _ in range(300)))
    return count_statuses(statuses)


@attack()
async def jobs_that_are_cancelled(target: Target) -> str:
    """Adds 200 jobs to fal's queue, each cancelled at once; 200 more, cancelled 5 s later."""
    scene = {"scene": [{"text": LONG_TEXT[:2000]}] * 4}
    statuses, waiting = [], []
    async with target.client() as client:
        for number in range(400):
            response = await client.post("/queue/fal-ai/csm-1b", json=scene)
            statuses.append(response.status_code)
            if response.status_code < 300:
                waiting.append(response.json()["request_id"])
            if number < 200:
                await _cancel_all(client, waiting)
        await asyncio.sleep(5)
        await _cancel_all(client, waiting)
    return count_statuses(statuses)


async def _cancel_all(client: httpx.AsyncClient, jobs: list[str]) -> None:
    while jobs:
        await client.put(f"/queue/fal-ai/csm-1b/requests/{jobs.pop()}/cancel")


@attack()
async def cancel_flood(target: Target) -> str:
    """Sends and cancels a sentence 1000 times on one WebSocket."""
    async with target.socket() as socket:
        reading = asyncio.create_task(_count(socket))
        for _ in range(1000):
            await socket.send('{"type":"text","text":"One two three. "}')
            await socket.send('{"type":"cancel"}')
        await asyncio.sleep(5)
        reading.cancel()
    return "sent and cancelled"


@attack()
async def message_flood(target: Target) -> str:
    """Opens 20 WebSockets that send 3000 small messages each as fast as possible."""
    message = '{"type":"session","temperature":0.5}'

    async def flood() -> int:
        sent = 0
        with contextlib.suppress(Exception):
            async with target.socket() as socket:
                reading = asyncio.create_task(_count(socket))
                while sent < 3000:
                    await socket.send(message)
                    sent += 1
                reading.cancel()
        return sent

    async with asyncio.timeout(60):
        sent = await asyncio.gather(*(flood() for _ in range(20)))
    return f"{sum(sent)} sent"


@attack()
async def followers(target: Target) -> str:
    """Opens 400 event streams of the status of a job."""
    async with target.client() as client:
        scene = {"scene": [{"text": LONG_TEXT[:4000]}] * 4}
        jobs = [await client.post("/queue/fal-ai/csm-1b", json=scene) for _ in range(20)]
        names = [job.json()["request_id"] for job in jobs if job.is_success]
        path = f"/queue/fal-ai/csm-1b/requests/{names[-1]}/status/stream"
        request = target.head("GET", path)
        pairs = []
        for _ in range(400):
            reader, writer = await target.connect()
            pairs.append((reader, writer))
            writer.write(request)
        async with closing([writer for _, writer in pairs]):
            await asyncio.sleep(15)
        await _cancel_all(client, names)
    return f"{len(pairs)} followed a job that waits"


async def _count(socket: object) -> None:
    async for _ in socket:
        pass


@attack(Server.LIMITED, floods=False)
async def socket_under_a_rate(target: Target) -> str:
    """Sends 150 utterances on one WebSocket where 60 requests a minute are allowed."""
    done, refused = 0, 0
    async with target.socket() as socket:
        await socket.send('{"type":"session","max_audio_length_ms":160}')
        for _ in range(150):
            await socket.send('{"type":"text","text":"One. "}')
            await socket.send('{"type":"flush"}')
        with contextlib.suppress(TimeoutError, Exception):
            async with asyncio.timeout(20):
                async for message in socket:
                    if isinstance(message, str):
                        kind = json.loads(message)["type"]
                        done, refused = done + (kind == "done"), refused + (kind == "error")
    if done > 85:
        raise BrokeError(f"{done} utterances in 20 s")
    return f"{done} spoken, {refused} refused in 20 s"


@attack(Server.LIMITED, floods=False)
async def forwarded_for(target: Target) -> str:
    """Sends 200 requests, each with another X-Forwarded-For, where 60 a minute are allowed."""
    statuses = []
    async with target.client() as client:
        for number in range(200):
            given = f"203.0.113.{number}"
            more = {"X-Forwarded-For": given, "Forwarded": f"for={given}", "X-Real-IP": given}
            statuses.append((await client.get("/v1/models", headers=more)).status_code)
    if 429 not in statuses:
        raise BrokeError("never refused")
    return f"{statuses.count(200)} answered, {statuses.count(429)} refused"
