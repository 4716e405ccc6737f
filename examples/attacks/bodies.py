"""Bodies and messages that are small but expensive."""

import asyncio
import contextlib
import json
import zlib

import httpx
import websockets

from attacks.registry import Server, attack
from attacks.target import JSON_TYPE, BrokeError, Target

PATHS = ("/generate", "/v1/audio/speech", "/fal-ai/csm-1b", "/v1/inference/sesame/csm-1b")


async def _refused(target: Target, bodies: dict[str, tuple[str, bytes]], **headers: str) -> str:
    """Posts each body once; every one must be refused with a status of 400 to 499."""
    outcomes = []
    async with target.client() as client:
        for name, (path, body) in bodies.items():
            try:
                response = await client.post(path, content=body, headers=JSON_TYPE | headers)
            except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
                outcomes.append(f"{name}: closed")
                continue
            if not 400 <= response.status_code < 500:
                raise BrokeError(f"{name} to {path}: {response.status_code}")
            if len(response.content) > 100_000:
                raise BrokeError(f"{name}: an error of {len(response.content)} bytes")
            outcomes.append(f"{name}: {response.status_code}")
    return "; ".join(outcomes)


@attack()
async def million_entries(target: Target) -> str:
    """Sends a scene and a context of a million empty entries; an object of a million fields."""
    many = b",".join([b"{}"] * 1_000_000)
    fields = b",".join(b'"%d":0' % number for number in range(1_000_000))
    bodies = {
        "scene": ("/fal-ai/csm-1b", b'{"scene":[' + many + b"]}"),
        "queued": ("/queue/fal-ai/csm-1b", b'{"scene":[' + many + b"]}"),
        "context": ("/fal-ai/csm-1b", b'{"scene":[{"text":"a"}],"context":[' + many + b"]}"),
        "fields": ("/v1/audio/speech", b'{"model":"csm-1b",' + fields + b"}"),
    }
    return await _refused(target, bodies)


@attack()
async def large_ignored_field(target: Target) -> str:
    """Sends 30 MB of JSON in an unknown field to each API."""
    ignored = b"[" + b",".join([b"[]"] * 10_000_000) + b"]"
    bodies = {path: (path, b'{"text":"a","ignored":' + ignored + b"}") for path in PATHS}
    return await _refused(target, bodies)


@attack()
async def deep_nesting(target: Target) -> str:
    """Sends lists and objects nested 100 000 deep, and a number of a million digits."""
    deep, objects = b"[" * 100_000, b'{"a":' * 100_000
    bodies = {f"lists {path}": (path, deep) for path in PATHS}
    bodies |= {f"objects {path}": (path, objects) for path in PATHS}
    number = b'{"text":"a","seed":' + b"9" * 1_000_000 + b"}"
    return await _refused(target, bodies | {"digits": ("/generate", number)})


@attack()
async def large_messages(target: Target) -> str:
    """Sends WebSocket messages of 15 MB: text, empty lists, nesting, compressed; 200 of 100 kB."""
    messages = [
        '{"type":"text","text":"' + "a" * 15_000_000 + '"}',
        '{"type":"turn","text":"a","speaker":0,"x":[' + ",".join(["[]"] * 5_000_000) + "]}",
        "[" * 15_000_000,
        " " * 15_000_000,
    ]
    outcomes = []
    for message in messages:
        outcomes.append(await _last_message(target, [message]))
    outcomes.append(
        await _last_message(target, ['{"type":"text","text":"%s"}' % ("a" * 100_000)] * 200)
    )
    return "; ".join(outcomes)


async def _last_message(target: Target, messages: list[str]) -> str:
    """The server's last message after messages that are all invalid."""
    # Compressed, 15 MB are a few kB.
    async with target.socket(compression="deflate") as socket:
        with contextlib.suppress(websockets.ConnectionClosed):
            for message in messages:
                await socket.send(message)
        try:
            async with asyncio.timeout(60):
                response = json.loads(await socket.recv())
        except websockets.ConnectionClosed as error:
            return f"closed {error.rcvd.code if error.rcvd else ''}"
    if response["type"] != "error":
        raise BrokeError(f"{response['type']} came of a message that cannot be done")
    return str(response.get("code"))


@attack()
async def compressed_bodies(target: Target) -> str:
    """Sends bodies with Content-Encoding gzip and deflate that unpack to 100 MB."""
    deflated = zlib.compress(b" " * 100_000_000, 9)
    gzip = zlib.compressobj(9, wbits=31)
    packed = gzip.compress(b" " * 100_000_000) + gzip.flush()
    deflate = await _refused(
        target, {"deflate": ("/generate", deflated)}, **{"Content-Encoding": "deflate"}
    )
    more = await _refused(target, {"gzip": ("/generate", packed)}, **{"Content-Encoding": "gzip"})
    return f"{deflate}; {more}"


@attack(floods=False)
async def numbers_that_are_none(target: Target) -> str:
    """Sends NaN, Infinity, huge and negative numbers, booleans and text in numeric fields."""
    values = ["NaN", "Infinity", "-Infinity", "1e999", "-1", "1" + "0" * 400, "true", '"1e3"', "[]"]
    fields = ("temperature", "top_k", "seed", "speaker", "max_audio_length_ms")
    fields += ("repetition_penalty", "top_p", "min_p")
    async with target.client() as client:
        for field in fields:
            for value in values:
                limit = "" if field == "max_audio_length_ms" else ',"max_audio_length_ms":160'
                body = f'{{"text":"a","{field}":{value}{limit}}}'
                response = await client.post("/generate", content=body, headers=JSON_TYPE)
                is_odd = value not in ("true", '"1e3"')
                if response.status_code >= 500 or (is_odd and response.status_code < 400):
                    raise BrokeError(f"{field}={value[:20]}: {response.status_code}")
    return f"{len(fields) * len(values)} values, none accepted that is no number"


@attack(floods=False)
async def truncated_form(target: Target) -> str:
    """Sends a multipart body without its last boundary."""
    form = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\none\r\n--x\r\n'
    form += b'Content-Disposition: form-data; name="max_audio_length_ms"\r\n\r\n160'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    async with target.client() as client:
        for path in ("/generate", "/v1/inference/sesame/csm-1b"):
            response = await client.post(path, content=form, headers=kind)
            if response.status_code != 400:
                raise BrokeError(f"{path}: {response.status_code}")
    return "refused with 400"


@attack(Server.OPEN, floods=False)
async def blank_turn(target: Target) -> str:
    """Sends a WebSocket turn of a space, then a sentence."""
    async with target.socket() as socket, asyncio.timeout(60):
        await socket.send('{"type":"session","max_audio_length_ms":400}')
        await socket.send('{"type":"turn","speaker":1,"text":" "}')
        await socket.send('{"type":"text","text":"One."}')
        await socket.send('{"type":"flush"}')
        codes = []
        while True:
            message = await socket.recv()
            if isinstance(message, bytes):
                continue
            event = json.loads(message)
            if event["type"] == "error":
                codes.append(event.get("code"))
            if len(codes) > 1:
                raise BrokeError("the sentence after it fails")
            if event["type"] == "done":
                return "the sentence after it is spoken"
