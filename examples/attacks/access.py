"""Attacks on other tenants' objects, on keys, and from foreign web pages."""

import asyncio
import contextlib
import json
import stat

import httpx
import websockets

from attacks.registry import Server, attack
from attacks.speech import quiet_recording
from attacks.target import HOUSE_VOICE, BrokeError, Target, add_voice

_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/audio/speech"}
_LINE["body"] = {"model": "csm-1b", "input": "one", "voice": "0", "max_audio_length_ms": 160}
_EVIL = "http://evil.example"


@attack(Server.KEYS, floods=False)
async def objects_of_another_key(target: Target) -> str:
    """Reads, lists and deletes files, batches, results, voices and jobs of another key."""
    async with target.client(0) as owner, target.client(1) as thief:
        made = await _make_objects(owner)
        tried = [("GET", f"/v1/files/{made['file']}"), ("GET", f"/v1/files/{made['file']}/content")]
        tried += [("GET", f"/v1/batches/{made['batch']}")]
        tried += [("POST", f"/v1/batches/{made['batch']}/cancel")]
        tried += [("DELETE", f"/v1/files/{made['file']}")]
        job = f"/queue/fal-ai/csm-1b/requests/{made['job']}"
        tried += [("GET", job), ("GET", f"{job}/status"), ("PUT", f"{job}/cancel")]
        tried += [("GET", f"{job}/status/stream")]
        tried += [("DELETE", f"/v1/audio/voices/{made['voice']}")]
        taken = []
        for method, path in tried:
            response = await thief.request(method, path)
            if response.status_code < 400:
                taken.append(f"{method} {path.split('/')[2:4]}")
        for path in ("/v1/files", "/v1/batches", "/v1/audio/voices"):
            text = (await thief.get(path)).text
            if any(name in text for name in made.values()):
                taken.append(f"list of {path}")
        body = {"text": "one", "voice": made["voice"], "max_audio_length_ms": 160}
        if (await thief.post("/generate", json=body)).status_code < 400:
            taken.append("speaks in the voice")
        batch = {"input_file_id": made["file"], "endpoint": "/v1/audio/speech"}
        batch["completion_window"] = "24h"
        if (await thief.post("/v1/batches", json=batch)).status_code < 400:
            taken.append("batch of the file")
        if (await owner.get(f"/v1/files/{made['file']}")).status_code != 200:
            taken.append("the file is gone")
    if taken:
        raise BrokeError("; ".join(taken))
    return f"{len(tried) + 6} ways, nothing found"


async def _make_objects(client: httpx.AsyncClient) -> dict[str, str]:
    """Makes a file, a batch, a voice and a job; returns their names."""
    lines = json.dumps(_LINE).encode()
    form = {"purpose": "batch"}
    file = (await client.post("/v1/files", data=form, files={"file": ("a.jsonl", lines)})).json()
    batch = {"input_file_id": file["id"], "endpoint": "/v1/audio/speech"}
    batch["completion_window"] = "24h"
    batch = (await client.post("/v1/batches", json=batch)).json()
    response = await add_voice(client, "attacked", quiet_recording(3), "one two three")
    if response.status_code >= 400:
        raise RuntimeError(f"no voice can be added: {response.text[:200]}")
    scene = {"scene": [{"text": "one"}], "max_audio_length_ms": 160}
    job = (await client.post("/queue/fal-ai/csm-1b", json=scene)).json()
    return {"file": file["id"], "batch": batch["id"], "voice": "attacked", "job": job["request_id"]}


@attack(Server.KEYS, floods=False)
async def voices_of_the_operator(target: Target) -> str:
    """Replaces and deletes a voice of --voices."""
    async with target.client(0) as client:
        added = await add_voice(client, HOUSE_VOICE, quiet_recording(3), "mine now")
        deleted = await client.delete(f"/v1/audio/voices/{HOUSE_VOICE}")
    changed = [
        name for name, each in (("replaced", added), ("deleted", deleted)) if each.is_success
    ]
    if changed:
        raise BrokeError(" and ".join(changed))
    return f"refused: {added.status_code}, {deleted.status_code}"


@attack(Server.KEYS)
async def wrong_keys(target: Target) -> str:
    """Sends 1500 wrong keys."""
    statuses = []
    async with target.client() as client:
        for number in range(1500):
            headers = {"Authorization": f"Bearer guess-{number}"}
            statuses.append((await client.get("/v1/models", headers=headers)).status_code)
    if 200 in statuses or 429 not in statuses:
        raise BrokeError(
            f"{statuses.count(401)} guesses, {statuses.count(429)} of 1500 refused as too many"
        )
    return f"{statuses.count(401)} guesses, then {statuses.count(429)} times 429"


@attack(Server.KEYS, floods=False)
async def key_in_the_log(target: Target) -> str:
    """Sends a key in a WebSocket's address, in headers, in a query, in a refused body."""
    key = target.keys[0]
    with contextlib.suppress(Exception):
        async with websockets.connect(f"{target.socket_url}?api_key={key}") as socket:
            await socket.send(json.dumps({"type": key}))
            await socket.recv()
    async with target.client() as client:
        await client.get(f"/v1/models?api_key={key}")
        await client.get(f"/v1/models/{key}")
        await client.post(f"/generate?key={key}", content=b"{", headers={"X-Request-ID": "a"})
    async with httpx.AsyncClient() as client:
        wrong = key[:-2]
        await client.get(f"{target.url}/v1/models", headers={"x-api-key": wrong})
        with contextlib.suppress(Exception):
            async with websockets.connect(f"{target.socket_url}?api_key={wrong}"):
                pass
    await asyncio.sleep(1)
    lines = [line for line in target.log().splitlines() if key[:-2] in line]
    # A key in a path cannot be recognized as one.
    lines = [line for line in lines if f"/v1/models/{key}" not in line]
    if lines:
        raise BrokeError(f"{len(lines)} lines: {lines[0][:120].replace(key, 'KEY')}")
    return "not in the log"


@attack(Server.KEYS, floods=False)
async def without_a_key(target: Target) -> str:
    """Requests every address of the OpenAPI document without a key; OPTIONS, HEAD and TRACE too."""
    async with httpx.AsyncClient(base_url=target.url, timeout=30) as stranger:
        async with target.client() as client:
            response = await client.get("/openapi.json")
        paths = response.json()["paths"] if response.is_success else {"/v1/models": {"get": {}}}
        served = []
        for path, methods in paths.items():
            for method in [*methods, "options", "trace", "patch"]:
                for form in (path, f"/{path}", path.upper(), f"{path}/", f"/.{path}", f"{path};a"):
                    response = await stranger.request(
                        method, form.replace("{", "").replace("}", "")
                    )
                    if response.is_success:
                        served.append(f"{method.upper()} {form}")
    known = {"/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json"}
    more = {each for each in served if each.split()[1].removeprefix("/.") not in known}
    if more:
        raise BrokeError(f"served: {', '.join(sorted(more))[:200]}")
    return f"{len(paths)} paths; only probes are served"


@attack(Server.KEYS, floods=False)
async def files_of_the_server(target: Target) -> str:
    """Checks the permissions of the files below --data for other users of the machine."""
    if target.home is None:
        return "not known of a server that runs elsewhere"
    seen = [path for path in (target.home / "data").rglob("*") if path.exists()]
    others = stat.S_IRWXG | stat.S_IRWXO
    readable = [path for path in seen if path.stat().st_mode & others]
    if readable:
        raise BrokeError(f"{len(readable)} of {len(seen)}, such as {readable[0].name}")
    return f"{len(seen)} files and directories, all of one user's"


@attack(floods=False)
async def pages_of_others(target: Target) -> str:
    """Sends a WebSocket, a form and an untyped body of a foreign page, and a foreign Host."""
    served = []
    for origin in (_EVIL, "null", f"{target.url}.evil.example", "http://localhost.evil.example"):
        with contextlib.suppress(websockets.InvalidHandshake, websockets.ConnectionClosed, OSError):
            async with target.socket(origin=origin) as socket, asyncio.timeout(10):
                await socket.send('{"type":"session"}')
                await socket.recv()
                served.append(f"WebSocket of {origin}")
    body = json.dumps({"text": "one", "max_audio_length_ms": 160, "speaker": 0})
    scene = json.dumps({"scene": [{"text": "one"}], "max_audio_length_ms": 160})
    speech = json.dumps(_LINE["body"])
    requests = [("/generate", body), ("/fal-ai/csm-1b", scene), ("/v1/audio/speech", speech)]
    async with target.client() as client:
        for path, content in requests:
            for kind in ("", "text/plain", "application/x-www-form-urlencoded"):
                headers = {"Content-Type": kind} if kind else {}
                response = await client.post(path, content=content, headers=headers)
                if response.is_success:
                    served.append(f"{path} as {kind or 'no type'}")
        form = {"text": "one", "max_audio_length_ms": "160"}
        for headers in ({"Origin": _EVIL}, {"Sec-Fetch-Site": "cross-site"}):
            if (await client.post("/generate", data=form, headers=headers)).is_success:
                served.append(f"form with {headers}")
        if (await client.post("/generate", json=form, headers={"Origin": _EVIL})).is_success:
            served.append("JSON of another origin")
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "[::1"):
            for path in ("/v1/models", "/"):
                if (await client.get(path, headers={"Host": host})).status_code < 400:
                    served.append(f"{path} of Host {host}")
        allowed = await client.options("/generate", headers={"Origin": _EVIL, **_PREFLIGHT})
        if allowed.headers.get("access-control-allow-origin") in ("*", _EVIL):
            served.append("preflight")
    if served:
        raise BrokeError("; ".join(served)[:400])
    return "all refused"


_PREFLIGHT = {"Access-Control-Request-Method": "POST"}
