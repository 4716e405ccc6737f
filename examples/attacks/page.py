"""Files of the machine, read through the web page or as a recording's address."""

import asyncio
import base64
import contextlib
import json
import os
import re
import tempfile
from pathlib import Path

import httpx

from attacks.registry import Server, attack
from attacks.target import SECRET, BrokeError, Target

_WALKS = [
    "/page/../../../../{}",
    "/page/%2e%2e/%2e%2e/%2e%2e/%2e%2e/{}",
    "/page/..%2f..%2f..%2f..%2f..%2f{}",
    "/page//{}",
    "/page/file={}",
    "/page/gradio_api/file={}",
    "/files/..%2f..%2f..%2f{}",
    "/files/%2fetc%2fpasswd{}",
    "/static/..%2f..%2f..%2f{}",
]


@attack(floods=False)
async def file_through_page(target: Target) -> str:
    """A path as a file object in gradio's queue; walks out of the page's directory."""
    secret = str(target.home / "secret.txt") if target.home else "/etc/hostname"
    wanted = Path(secret).read_text().strip()
    async with target.client() as client:
        walks = [walk.format(secret.lstrip("/")) for walk in _WALKS]
        walks += [walk.format(secret) for walk in _WALKS if "=" in walk]
        seen = {path: (await client.get(path)).text for path in walks}
        copies = await _copies_in_gradio(client, secret)
        for path in copies:
            seen[path] = (await client.get(f"/page/gradio_api/file={path}")).text
    if found := [path for path, text in seen.items() if wanted and wanted in text]:
        raise BrokeError(f"the file was served at {found[0][:80]}")
    return f"{len(seen)} addresses, none serves it"


@attack()
async def fifo_as_file(target: Target) -> str:
    """A FIFO and a URL as the path of a file object in gradio's queue, and as recordings."""
    with tempfile.TemporaryDirectory() as directory:
        fifo = f"{directory}/fifo"
        os.mkfifo(fifo)
        async with target.client() as client:
            for path in (fifo, f"{target.url}/healthz"):
                await _recordings_by_path(client, path)
                await _copies_in_gradio(client, path)
                async with asyncio.timeout(6):
                    await client.get("/healthz")
    return "refused; the event loop went on"


async def _recordings_by_path(client: httpx.AsyncClient, path: str) -> None:
    """Names a file where base64 and addresses of recordings are read."""
    turn = {"prompt": "one", "audio_url": path}
    bodies = {"/generate": {"text": "one", "audio": path, "audio_text": "one"}}
    bodies["/fal-ai/csm-1b"] = {"scene": [{"text": "one"}], "context": [turn]}
    for address, body in bodies.items():
        async with asyncio.timeout(20):
            answer = await client.post(address, json=body)
        if answer.status_code < 400:
            raise BrokeError(f"{address} read {path}")


async def _copies_in_gradio(client: httpx.AsyncClient, path: str) -> list[str]:
    """What gradio, where there is one, copies a file to that each of its functions is given."""
    answer = await client.get("/page/config")
    if answer.status_code != 200 or "dependencies" not in answer.text:
        return []
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    copies = []
    for function in answer.json()["dependencies"][:8]:
        body = {"fn_index": function["id"], "session_hash": f"attack{function['id']}"}
        body["data"] = [file] * len(function["inputs"])
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(8):
                await client.post("/page/gradio_api/queue/join", json=body)
                where = f"/page/gradio_api/queue/data?session_hash={body['session_hash']}"
                text = (await client.get(where)).text
                copies += re.findall(r"/tmp/gradio/[\w./-]+", text)  # noqa: S108, not written to
    return sorted(set(copies))


@attack(Server.OPEN, floods=False)
async def addresses_of_this_machine(target: Target) -> str:
    """Recordings at file:, gopher:, unix: and loopback addresses, in every notation of them."""
    port = target.address[1]
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "[::1]", "0"]
    hosts += ["[::ffff:127.0.0.1]", "127.1", "localhost.", "127.0.0.1.", "①②⑦.⓪.⓪.①"]
    urls = [f"http://{host}:{port}/healthz" for host in hosts]
    urls += [f"{kind}://127.0.0.1:{port}/healthz" for kind in ("file", "gopher", "ftp", "unix")]
    urls += ["file:///etc/hostname", "data:text/plain,hello", "data:audio/wav;base64,!!!!"]
    async with target.client() as client:
        for url in urls:
            turn = {"prompt": "one", "audio_url": url}
            body = {"scene": [{"text": "one"}], "context": [turn]}
            answer = await client.post("/fal-ai/csm-1b", content=json.dumps(body), headers=_JSON)
            if answer.status_code < 400 or answer.status_code >= 500 or SECRET in answer.text:
                raise BrokeError(f"{url}: {answer.status_code}")
    return f"{len(urls)} addresses refused"


@attack(floods=False)
async def hopeless_recordings(target: Target) -> str:
    """Recordings of one sample, of silence, of amplitude 1e38, and of noise as a FLAC file."""
    import struct

    def wav(samples: list[float]) -> bytes:
        data = struct.pack(f"<{len(samples)}f", *samples)
        form = struct.pack("<HHIIHH", 3, 1, 24_000, 96_000, 4, 32)
        body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data))
        return b"RIFF" + struct.pack("<I", len(body) + len(data)) + body + data

    cases = {"one sample": wav([0.5]), "silence": wav([0.0] * 24_000)}
    cases |= {"constant": wav([0.5] * 24_000), "1e38": wav([1e38, -1e38] * 12_000)}
    cases |= {"not a number": wav([float("nan")] * 24_000), "noise": b"fLaC" + os.urandom(4000)}
    accepted = []
    async with target.client() as client:
        for name, data in cases.items():
            body = {"text": "one", "audio_text": "one", "max_audio_length_ms": 400}
            body["audio"] = base64.b64encode(data).decode()
            answer = await client.post("/generate", json=body)
            message = answer.text if answer.status_code >= 400 else ""
            if answer.status_code != 400 or " object at 0x" in message:
                accepted.append(f"{name} {answer.status_code} {message[:80]}")
    if accepted:
        raise BrokeError("; ".join(accepted))
    return f"{len(cases)} recordings refused"


_JSON = {"Content-Type": "application/json"}
