"""Batches: behind live requests, to the last line, whatever happens in between."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
from serving import SMALL, as_samples, serve

from csm_jax.serve.settings import Limits, Settings


def lines(count: int, **more) -> bytes:
    body = {"model": "csm-1b", "voice": "slt", "response_format": "wav", "seed": 1} | more
    return b"".join(
        json.dumps({"custom_id": f"line-{i}", "body": body | {"input": f"{i}"}}).encode() + b"\n"
        for i in range(count)
    )


def wait(url: str, batch_id: str, until=lambda batch: batch["status"] != "in_progress") -> dict:
    deadline = time.monotonic() + 120
    while not until(batch := httpx.get(f"{url}/v1/batches/{batch_id}").json()):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def results(url: str, batch: dict) -> list[dict]:
    text = httpx.get(f"{url}/v1/files/{batch['output_file_id']}/content").text
    return [json.loads(line) for line in text.splitlines()]


def test_the_openai_client_runs_a_batch(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        file = client.files.create(file=("lines.jsonl", lines(5)), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/audio/speech", completion_window="24h"
        )
        assert batch.request_counts.total == 5
        wait(server.url, batch.id)
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert batch.request_counts.completed == 5
        assert batch.id in [each.id for each in client.batches.list()]
        found = [
            json.loads(line) for line in client.files.content(batch.output_file_id).iter_lines()
        ]
        assert client.files.delete(file.id).deleted
    assert [each["custom_id"] for each in found] == [f"line-{i}" for i in range(5)]
    for each in found:
        audio = base64.b64decode(each["response"]["body"]["audio"])
        assert len(as_samples(audio)) > 5_000


def test_a_line_says_what_it_says_alone(server):
    batch = server.post("/v1/batches", files={"file": lines(1)}).json()
    [result] = results(server.url, wait(server.url, batch["id"]))
    body = {"text": "0", "voice": "slt", "seed": 1}
    alone = server.post("/generate", json=body).content
    assert base64.b64decode(result["response"]["body"]["audio"]) == alone


def test_a_line_that_fails_says_why(server):
    data = lines(1) + lines(1, voice="nobody").replace(b"line-0", b"bad")
    batch = server.post("/v1/batches", files={"file": data}).json()
    batch = wait(server.url, batch["id"])
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    good, bad = results(server.url, batch)
    assert good["error"] is None
    assert bad["response"] is None
    assert "nobody" in bad["error"]["message"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 lines"),
        (b"{", "line 1"),
        (lines(1) + lines(1), "line 2: custom_id 'line-0' is there twice"),
        (lines(1) + b'{"custom_id": "b", "body": {}}', "line 2: body.model"),
        (b'{"custom_id": "b", "url": "/v1/chat", "body": {}}', "line 1: url"),
        (lines(1, speed=9), "line 1: body.speed"),
    ],
)
def test_a_file_that_is_wrong_is_refused_as_a_whole(server, data, message):
    answer = server.post("/v1/batches", files={"file": ("lines.jsonl", data)})
    assert answer.status_code == 400
    assert message in answer.json()["detail"]


def test_what_is_not_there(server):
    for path in ("/v1/batches/x", "/v1/files/x", "/v1/files/x/content"):
        assert server.get(path).status_code == 404
    assert server.post("/v1/batches/x/cancel").status_code == 404
    body = {"input_file_id": "file-x"}
    assert server.post("/v1/batches", json=body).status_code == 404


def test_cancel(server):
    batch = server.post("/v1/batches", files={"file": lines(200)}).json()
    wait(server.url, batch["id"], lambda batch: batch["request_counts"]["completed"] > 2)
    cancelled = server.post(f"/v1/batches/{batch['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    server.wait_until_idle()
    done = server.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"]
    assert 2 < done < 200
    assert len(results(server.url, cancelled)) == done


def test_live_requests_go_first(server):
    """A row is free for them, however much the batch has to say."""
    batch = server.post("/v1/batches", files={"file": lines(100)}).json()
    wait(server.url, batch["id"], lambda batch: batch["request_counts"]["completed"] > 2)
    engine = server.service.engine
    assert engine.num_speaking < engine.max_batch
    answer = server.post("/generate", json={"text": "one two three", "seed": 1})
    assert answer.status_code == 200
    counts = server.get(f"/v1/batches/{batch['id']}").json()["request_counts"]
    assert counts["completed"] < 100
    server.post(f"/v1/batches/{batch['id']}/cancel")


def test_a_restart_goes_on(model, tmp_path):
    """After the process has been told to end."""
    settings = Settings(**SMALL, data=tmp_path)
    with serve(model, settings) as first:
        batch = first.post("/v1/batches", files={"file": lines(30)}).json()
        wait(first.url, batch["id"], lambda batch: batch["request_counts"]["completed"] > 2)
    with serve(model, settings) as second:
        done = wait(second.url, batch["id"])
        found = results(second.url, done)
    assert [each["custom_id"] for each in found] == [f"line-{i}" for i in range(30)]
    assert done["request_counts"] == {"total": 30, "completed": 30, "failed": 0}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_kill_9(tmp_path, seed):
    """No line is lost, none is there twice."""
    count = 40
    process, url = start(tmp_path)
    batch = httpx.post(f"{url}/v1/batches", files={"file": lines(count)}).json()
    wait(url, batch["id"], lambda batch: batch["request_counts"]["completed"] > 5 + 10 * seed)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process, url = start(tmp_path)
    try:
        done = wait(url, batch["id"])
        found = results(url, done)
    finally:
        process.terminate()
        # uvicorn drains, and then ends by the signal.
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    assert [each["custom_id"] for each in found] == [f"line-{i}" for i in range(count)]
    assert all(each["error"] is None for each in found)


def start(data) -> tuple[subprocess.Popen, str]:
    """The command, until it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "csm_jax.serve", "--checkpoint=demo", f"--port={port}"]
    command += [f"--data={data}", "--max_batch=4", "--max_seq_len=256"]
    process = subprocess.Popen(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline
        assert process.poll() is None
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return process, url
        except httpx.TransportError:
            time.sleep(0.1)


def test_files_have_room_up_to_a_limit(model):
    limits = Limits(stored_bytes=350_000)
    with serve(model, Settings(**SMALL, limits=limits)) as running:
        files = {"file": ("a.jsonl", lines(1000))}
        answers = [running.post("/v1/files", files=files) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 429, 429]
        assert answers[1].json()["error"]["code"] == "storage_full"
        running.get("/v1/batches")
        httpx.delete(f"{running.url}/v1/files/{answers[0].json()['id']}").raise_for_status()
        assert running.post("/v1/files", files=files).status_code == 200
