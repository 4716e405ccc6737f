"""A server ends within its deadline after SIGTERM, even with stuck clients."""

import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from websockets.sync.client import connect

DRAIN_SECONDS = 6
LONG = "one two three four five six seven. " * 100


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture
def process(own_cache):
    """The process of a server, and its URL."""
    port = free_port()
    more = ["--checkpoint=random:tiny", "--max_seq_len=256", f"--drain_seconds={DRAIN_SECONDS}"]
    started = subprocess.Popen([sys.executable, "-m", "csm_jax.serve", f"--port={port}", *more])
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    try:
        while True:
            assert time.monotonic() < deadline
            assert started.poll() is None
            try:
                httpx.get(f"{url}/healthz")
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield started, url, port
    finally:
        started.kill()
        started.wait()


@pytest.mark.long
def test_the_server_ends_within_its_deadline(process):
    """With a client that never reads, a job, a WebSocket, and a waiting request."""
    server, url, port = process
    body = json.dumps({"text": LONG, "streaming": True, "max_audio_length_ms": 300_000})
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json"
    job = {"scene": [{"text": LONG[:3000]}] * 20}
    address = url.replace("http", "ws") + "/v1/realtime"
    with socket.create_connection(("127.0.0.1", port)) as deaf, connect(address) as talk:
        deaf.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        assert httpx.post(f"{url}/queue/fal-ai/csm-1b", json=job).status_code == 200
        talk.send(json.dumps({"type": "say", "text": LONG[:3000]}))
        talk.recv(timeout=60)
        kept = httpx.Client()
        kept.get(f"{url}/healthz")
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        refused = _ask(kept, f"{url}/readyz")
        assert refused in (503, None)
        assert server.wait(DRAIN_SECONDS + 2) is not None
        assert time.monotonic() - started < DRAIN_SECONDS + 2


@pytest.mark.long
def test_an_idle_server_ends_immediately(process):
    server, _, _ = process
    started = time.monotonic()
    server.send_signal(signal.SIGTERM)
    server.wait(DRAIN_SECONDS + 2)
    assert time.monotonic() - started < DRAIN_SECONDS


def _ask(client: httpx.Client, url: str) -> int | None:
    """The status; None if the port is closed."""
    try:
        return client.get(url).status_code
    except httpx.HTTPError:
        return None
