"""Reading files of the machine through the web page or as the address of a recording."""

import asyncio
import json
import os
import tempfile
from pathlib import Path

import httpx

from attacks.registry import Server, attack
from attacks.target import JSON_TYPE, SECRET, BrokeError, Target

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
    """Requests paths outside the page's directory."""
    secret = str(target.home / "secret.txt") if target.home else "/etc/hostname"
    wanted = Path(secret).read_text().strip()
    async with target.client() as client:
        walks = [walk.format(secret.lstrip("/")) for walk in _WALKS]
        walks += [walk.format(secret) for walk in _WALKS if "=" in walk]
        seen = {path: (await client.get(path)).text for path in walks}
    if found := [path for path, text in seen.items() if wanted and wanted in text]:
        raise BrokeError(f"the file was served at {found[0][:80]}")
    return f"{len(seen)} addresses, none serves it"


@attack()
async def fifo_as_recording(target: Target) -> str:
    """Sends a FIFO and a URL as the address of a recording."""
    with tempfile.TemporaryDirectory() as directory:
        fifo = f"{directory}/fifo"
        os.mkfifo(fifo)
        async with target.client() as client:
            for path in (fifo, f"{target.url}/healthz"):
                await _recordings_by_path(client, path)
                async with asyncio.timeout(6):
                    await client.get("/healthz")
    return "refused; the event loop went on"


async def _recordings_by_path(client: httpx.AsyncClient, path: str) -> None:
    """Sends a path in the fields of recordings."""
    turn = {"prompt": "one", "audio_url": path}
    bodies = {"/generate": {"text": "one", "audio": path, "audio_text": "one"}}
    bodies["/fal-ai/csm-1b"] = {"scene": [{"text": "one"}], "context": [turn]}
    for address, body in bodies.items():
        async with asyncio.timeout(20):
            response = await client.post(address, json=body)
        if response.status_code < 400:
            raise BrokeError(f"{address} read {path}")


@attack(Server.OPEN, floods=False)
async def addresses_of_this_machine(target: Target) -> str:
    """Names recordings at file:, gopher:, unix: and loopback addresses, in every notation."""
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
            response = await client.post(
                "/fal-ai/csm-1b", content=json.dumps(body), headers=JSON_TYPE
            )
            if response.status_code < 400 or response.status_code >= 500 or SECRET in response.text:
                raise BrokeError(f"{url}: {response.status_code}")
    return f"{len(urls)} addresses refused"
