"""Requests that HTTP parsers interpret differently, and names that are paths or lines."""

import asyncio
import contextlib
import json
import re
import urllib.parse

from attacks.registry import Server, attack
from attacks.speech import quiet_recording
from attacks.target import (
    HOUSE_VOICE,
    JSON_TYPE,
    BrokeError,
    Target,
    add_voice,
    closing,
    count_statuses,
)

_HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-ID: smuggled\r\n\r\n"


async def _exchange(target: Target, request: bytes) -> bytes:
    """The server's output for some bytes within 3 s, or until it closes."""
    reader, writer = await target.connect()
    received = b""
    async with closing([writer]):
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(3):
                writer.write(request)
                await writer.drain()
                while data := await reader.read(65_536):
                    received += data
    return received


@attack(floods=False)
async def two_lengths(target: Target) -> str:
    """Sends requests with two lengths, unusual chunked coding, unusual line ends and spaces."""
    head = b"POST /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    size, chunked = len(_HIDDEN), "Transfer-Encoding: chunked\r\n"
    cases = {
        "length and chunked": f"Content-Length: {size + 5}\r\n{chunked}\r\n0\r\n\r\n",
        "two lengths": f"Content-Length: 0\r\nContent-Length: {size}\r\n\r\n",
        "list of lengths": f"Content-Length: 0, {size}\r\n\r\n",
        "plus": f"Content-Length: +{size}\r\n\r\n",
        "underscore": f"Content-Length: {size // 10}_{size % 10}\r\n\r\n",
        "xchunked": f"Transfer-Encoding: xchunked\r\nContent-Length: {size}\r\n\r\n",
        "two codings": f"{chunked}Transfer-Encoding: x\r\nContent-Length: {size}\r\n\r\n",
        "space before colon": f"Content-Length : {size}\r\n\r\n",
        "folded": f"Content-Length:\r\n {size}\r\n\r\n",
        "bare line feeds": f"Content-Length: {size}\n\n",
        "NUL": f"Content-Length: {size}\x00\r\n\r\n",
        "chunk size": f"{chunked}\r\n{'f' * 17}0\r\n",
        "chunk extension": f"{chunked}\r\n0;{'a' * 100_000}\r\n\r\n",
    }
    outcomes = []
    for name, rest in cases.items():
        received = await _exchange(target, head + rest.encode() + _HIDDEN)
        statuses = re.findall(rb"HTTP/1.1 (\d+)", received)
        ambiguous = name in ("length and chunked", "two lengths", "list of lengths", "two codings")
        if b"500" in statuses or (ambiguous and (b"smuggled" in received or len(statuses) > 1)):
            raise BrokeError(f"{name}: {b' '.join(statuses).decode()}")
        outcomes.append(f"{name} {b' '.join(statuses).decode() or 'closed'}")
    return "; ".join(outcomes)


@attack(floods=False)
async def large_heads(target: Target) -> str:
    """Sends a line of 1 MB, 10 000 headers, and other protocols."""
    cases = {
        "target": b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        "header": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        "headers": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 100_000 + b"\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/0.9": b"GET /healthz\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
        "proxy": b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        "absolute": b"GET http://127.0.0.1:1/v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
        "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
    }
    outcomes = []
    for name, request in cases.items():
        received = await _exchange(target, request)
        status = (
            received.split(b" ")[1][:3].decode() if received.startswith(b"HTTP/1.1 ") else "closed"
        )
        # 505 says that a version of HTTP is not supported, which is so.
        if status.startswith(("2", "5")) and status != "505":
            raise BrokeError(f"{name}: {status}")
        outcomes.append(f"{name} {status}")
    return "; ".join(outcomes)


@attack(Server.OPEN, floods=False)
async def names_that_are_paths(target: Target) -> str:
    """Names voices, files, jobs and models ../x, absolute, encoded twice, or in unusual Unicode."""
    names = ["../x", "..\\x", "/etc/passwd", "%2e%2e%2fx", "..%252fx", "x\x00.flac", ".", "..", ""]
    names += [
        "x/../y",
        "\uff0e\uff0e\uff0fx",
        "\uff53lt",
        "slt\u200b",
        "a" * 65,
        "x\n",
        "x\u202e",
        "~root",
    ]
    audio = quiet_recording(2)
    accepted = []
    async with target.client() as client:
        for name in names:
            quoted = urllib.parse.quote(name, safe="")
            response = await add_voice(client, name, audio, file_name="../../x.flac")
            accepted += [f"voice {name!r}"] if response.is_success else []
            for path in (
                "/v1/audio/voices/{}",
                "/v1/files/{}/content",
                "/files/{}",
                "/v1/models/{}",
            ):
                response = await client.get(path.format(quoted))
                if response.status_code >= 500 or (response.is_success and len(quoted) > 1):
                    accepted.append(path.format(quoted))
            body = {"text": "one", "voice": name or "..", "max_audio_length_ms": 160}
            if (await client.post("/generate", json=body)).status_code not in (400, 404):
                accepted.append(f"speech in {name!r}")
    if accepted:
        raise BrokeError("; ".join(accepted)[:300])
    return f"{len(names)} names refused"


@attack(floods=False)
async def lines_into_the_log(target: Target) -> str:
    """Sends line ends and escape codes in paths, ids, names and methods; 500 paths for /metrics."""
    escapes = "\x1b[2J\nforged: yes\r\n\u2028\x00"
    quoted = urllib.parse.quote(escapes)
    async with target.client() as client:
        before = len((await client.get("/metrics")).text)
        for path in (f"/v1/models/{quoted}", f"/{quoted}", f"/v1/files/{quoted}"):
            await client.get(path)
        await client.post("/generate", json={"text": "one", "voice": escapes[:60]})
        await client.post("/v1/audio/speech", json={"model": escapes, "input": "a", "voice": "0"})
        for number in range(500):
            await client.request(f"METHOD{number}", f"/some/path/{number}")
        after = (await client.get("/metrics")).text
    for header in (b"X-Request-ID: a\x1b[2Jforged", b"X-Request-ID: " + b"a" * 5000):
        await _exchange(
            target, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + header + b"\r\n\r\n"
        )
    if len(after) - before > 10_000:
        raise BrokeError(f"/metrics grew by {len(after) - before} bytes")
    await asyncio.sleep(1)
    log = target.log()
    if "\x1b" in log or "\x00" in log or any(line.startswith("forged") for line in log.split("\n")):
        raise BrokeError("the log has an escape code or a line of the client's")
    return f"/metrics grew by {len(after) - before} bytes, the log has none of it"


@attack(floods=False)
async def odd_texts(target: Target) -> str:
    """Sends lone surrogates, NUL, combining and invisible characters in all encodings."""
    texts = ['"\\ud800"', '"\\u0000"', '"' + "e\\u0301" * 3000 + '"', '"\\u202e\\u200b\\ufeff"']
    texts += [
        json.dumps("\u0635\ufdfa" * 500),
        json.dumps("👩‍👩‍👧‍👦" * 200),
        '"a\\u0000b"',
        '"\\n\\n"',
    ]
    texts += ['" "', '"<|begin_of_text|>[1]"', json.dumps("[0]" * 500), '"' + "9" * 400 + '"']
    statuses = []
    async with target.client() as client:
        for text in texts:
            body = f'{{"text":{text},"max_audio_length_ms":160}}'
            statuses.append(
                (await client.post("/generate", content=body, headers=JSON_TYPE)).status_code
            )
        for body in (
            b'{"text":"\xff\xfe"}',
            '{"text":"one"}'.encode("utf-16"),
            b"\xef\xbb\xbf{}",
            b"",
        ):
            statuses.append(
                (await client.post("/generate", content=body, headers=JSON_TYPE)).status_code
            )
    if max(statuses) >= 500:
        raise BrokeError(f"{statuses.count(500)} internal errors: {statuses}")
    return count_statuses(statuses)


@attack(floods=False)
async def other_methods(target: Target) -> str:
    """Sends X-HTTP-Method-Override, _method, many ranges, Expect, and unknown upgrades."""
    async with target.client() as client:
        for header in ("X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method"):
            await client.post(f"/v1/audio/voices/{HOUSE_VOICE}", headers={header: "DELETE"})
            await client.get(
                f"/v1/audio/voices/{HOUSE_VOICE}?_method=DELETE", headers={header: "DELETE"}
            )
        voices = (await client.get("/v1/audio/voices")).text
        if HOUSE_VOICE not in voices:
            raise BrokeError("a voice was deleted by another method")
        ranges = "bytes=" + ",".join(f"{start}-{start}" for start in range(2000))
        statuses = []
        for path in ("/", "/page", "/page/", "/page/main.js", "/docs", "/healthz"):
            response = await client.get(path, headers={"Range": ranges})
            statuses.append(response.status_code)
            if response.status_code >= 500 or len(response.content) > 1_000_000:
                raise BrokeError(f"{path} with 2000 ranges: {response.status_code}")
        for headers in ({"Expect": "200-ok"}, {"Upgrade": "h2c", "Connection": "Upgrade"}):
            statuses.append((await client.get("/healthz", headers=headers)).status_code)
    return f"no method but the request's counts; {statuses}"
