"""Connections that are idle, send single bytes, or read nothing."""

import asyncio
import contextlib
import json
import time

from attacks.registry import Server, attack
from attacks.target import LONG_TEXT, BrokeError, Target, closing

# A server should close an idle connection sooner than this.
_HOLD_SECONDS = 30
_STREAMED = {"text": LONG_TEXT, "seed": 1, "streaming": True}


async def _open(target: Target, count: int, num_addresses: int, first: bytes = b"") -> list[tuple]:
    """Opens connections from `num_addresses` addresses; each sends `first`."""
    limit = asyncio.Semaphore(100)

    async def one(number: int) -> tuple | None:
        host = number % num_addresses
        async with limit:
            with contextlib.suppress(OSError, TimeoutError):
                reader, writer = await target.connect(f"127.1.{host // 250}.{1 + host % 250}")
                writer.write(first)
                return reader, writer
        return None

    opened = await asyncio.gather(*(one(number) for number in range(count)))
    return [pair for pair in opened if pair]


async def _is_closed(reader: asyncio.StreamReader) -> bool:
    """Whether the server has closed a connection, after reading what it sent."""
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(0.01):
            while await reader.read(65_536):
                pass
            return True
        return False
    return reader.at_eof() or reader.exception() is not None


async def _hold(target: Target, num_addresses: int, first: bytes = b"") -> str:
    pairs = await _open(target, target.num_idle, num_addresses, first)
    async with closing([writer for _, writer in pairs]):
        await asyncio.sleep(1)
        open_at_once = target.connections()
        await asyncio.sleep(_HOLD_SECONDS)
        closed = sum([await _is_closed(reader) for reader, _ in pairs])
    if closed < len(pairs):
        raise BrokeError(
            f"{len(pairs) - closed} of {len(pairs)} still open after {_HOLD_SECONDS} s"
        )
    return f"{len(pairs)} opened, {open_at_once} at once, all closed by the server"


@attack()
async def idle_connections(target: Target) -> str:
    """Opens thousands of connections from one address that send nothing."""
    return await _hold(target, 1)


@attack()
async def idle_connections_of_many(target: Target) -> str:
    """Opens as many from 500 addresses, which send half a head."""
    return await _hold(target, 500, b"GET /healthz HTTP/1.1\r\nHost: 127")


async def _drip(target: Target, head: bytes, count: int) -> str:
    """Sends a head, and then a byte a second."""
    pairs = await _open(target, count, 20, head)
    started = time.monotonic()
    open_pairs = list(pairs)
    async with closing([writer for _, writer in pairs]):
        while open_pairs and time.monotonic() < started + _HOLD_SECONDS + 15:
            for _, writer in open_pairs:
                with contextlib.suppress(OSError):
                    writer.write(b"a")
            await asyncio.sleep(1)
            states = [await _is_closed(reader) for reader, _ in open_pairs]
            open_pairs = [
                pair for pair, closed in zip(open_pairs, states, strict=True) if not closed
            ]
    seconds = time.monotonic() - started
    if open_pairs:
        raise BrokeError(f"{len(open_pairs)} of {len(pairs)} still open after {seconds:.0f} s")
    return f"all {len(pairs)} closed within {seconds:.0f} s"


@attack()
async def dripping_heads(target: Target) -> str:
    """Sends 300 heads byte by byte, without an end."""
    return await _drip(target, b"GET /healthz HTTP/1.1\r\nX: ", 300)


@attack()
async def dripping_bodies(target: Target) -> str:
    """Sends 300 bodies of 200 kB byte by byte."""
    more = {"Content_Type": "application/json", "Content_Length": 200_000}
    return await _drip(target, target.head("POST", "/generate", **more), 300)


@attack()
async def tiny_chunks_of_many(target: Target) -> str:
    """Sends bodies in chunks of a byte on 400 connections, for 15 s."""
    more = {"Content_Type": "application/json", "Transfer_Encoding": "chunked"}
    head, chunks = target.head("POST", "/generate", **more), b"1\r\n \r\n" * 10_000

    async def send(deadline: float) -> None:
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, TimeoutError):
                _, writer = await target.connect()
                async with closing([writer]), asyncio.timeout(10):
                    writer.write(head)
                    while time.monotonic() < deadline:
                        writer.write(chunks)
                        await writer.drain()

    deadline = time.monotonic() + 15
    await asyncio.gather(*(send(deadline) for _ in range(400)))
    return "the bystander is answered"


@attack(floods=False)
async def upgrades_with_large_heads(target: Target) -> str:
    """Opens 100 WebSockets with 200 headers each, and sends nothing more."""
    more = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": 13}
    more |= {"Sec_WebSocket_Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    more |= {f"X{number}": "a" for number in range(200)}
    pairs = await _open(target, 100, 1, target.head("GET", "/v1/realtime", **more))
    async with closing([writer for _, writer in pairs]):
        await asyncio.sleep(_HOLD_SECONDS)
        closed = sum([await _is_closed(reader) for reader, _ in pairs])
    if closed < len(pairs):
        raise BrokeError(f"{len(pairs) - closed} of {len(pairs)} are open still")
    return f"all {len(pairs)} closed"


@attack()
async def many_requests_in_one_go(target: Target) -> str:
    """Sends 20 000 pipelined requests to /healthz and reads no response."""
    _, writer = await target.connect()
    async with closing([writer]):
        writer.write(target.head("GET", "/healthz") * 20_000)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(10):
                await writer.drain()
        await asyncio.sleep(5)
    return "the bystander is answered"


async def _stalled_readers(target: Target, count: int, read: bool) -> str:
    body = json.dumps(_STREAMED).encode()
    more = {"Content_Type": "application/json", "Content_Length": len(body)}
    request = target.head("POST", "/generate", **more) + body
    pairs = await _open(target, count, 1, request)
    deadline = time.monotonic() + 90
    async with closing([writer for _, writer in pairs]):
        while time.monotonic() < deadline:
            await asyncio.sleep(1)
            if read:
                await asyncio.gather(*(_read_one(reader) for reader, _ in pairs))
            figures = await target.figures()
            # The bystander needs a slot too.
            if time.monotonic() > deadline - 80 and sum(figures.values()) <= 1:
                return f"rows are free {90 - deadline + time.monotonic():.0f} s after"
    raise BrokeError(
        f"rows {figures['batch_occupancy']:g}, queue {figures['queue_length']:g} at 90 s"
    )


async def _read_one(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(0.05):
            await reader.read(1)


@attack()
async def readers_that_never_read(target: Target) -> str:
    """Requests 12 streams of 10 000 characters and reads nothing."""
    return await _stalled_readers(target, 12, read=False)


@attack()
async def readers_of_one_byte(target: Target) -> str:
    """Requests 12 streams of 10 000 characters and reads a byte a second."""
    return await _stalled_readers(target, 12, read=True)


@attack()
async def socket_that_never_reads(target: Target) -> str:
    """Sends 200 long sentences over a WebSocket and reads nothing."""
    async with target.socket(max_queue=1) as socket:
        for _ in range(200):
            text = json.dumps({"type": "text", "text": LONG_TEXT[:400].replace(".", ",") + ". "})
            await socket.send(text)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            await asyncio.sleep(0.3)
            if time.monotonic() > deadline - 80:
                figures = await target.figures()
                if not sum(figures.values()):
                    seconds = 90 - deadline + time.monotonic()
                    return f"its row is free {seconds:.0f} s after"
        socket.transport.abort()
    raise BrokeError("it still has a row at 90 s")


@attack(Server.OWN)
async def termination(target: Target) -> str:
    """Sends SIGTERM beside a client that reads nothing, an idle WebSocket and jobs in the queue."""
    body = json.dumps(_STREAMED).encode()
    more = {"Content_Type": "application/json", "Content_Length": len(body)}
    pairs = await _open(target, 2, 1, target.head("POST", "/generate", **more) + body)
    async with closing([writer for _, writer in pairs]), target.socket(), target.client() as client:
        scene = {"scene": [{"text": LONG_TEXT}] * 8}
        for _ in range(3):
            await client.post("/queue/fal-ai/csm-1b", json=scene)
        await asyncio.sleep(2)
        started = time.monotonic()
        target.process.terminate()
        while target.process.poll() is None and time.monotonic() < started + 130:
            await asyncio.sleep(0.2)
        seconds = time.monotonic() - started
    if seconds > 65:
        raise BrokeError(f"gone after {seconds:.0f} s, and compose's grace is 70 s")
    return f"gone after {seconds:.0f} s"
