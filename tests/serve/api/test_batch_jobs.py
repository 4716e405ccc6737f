"""Batches: in the background, complete, and unaffected by restarts and full disks."""

import base64
import codecs
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving import SMALL, as_samples, serve
from stores import limit_pages

from csm_jax.serve.api import batch_worker
from csm_jax.serve.api.batches import _parse_lines
from csm_jax.serve.settings import Limits, Settings
from csm_jax.serve.store import database


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


def test_a_line_has_the_same_speech_as_a_single_request(server):
    batch = server.post("/v1/batches", files={"file": lines(1)}).json()
    [result] = results(server.url, wait(server.url, batch["id"]))
    body = {"text": "0", "voice": "slt", "seed": 1}
    alone = server.post("/generate", json=body).content
    assert base64.b64decode(result["response"]["body"]["audio"]) == alone


def test_the_result_of_a_failed_line_has_an_error(server):
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
        (lines(1) + b'{"custom_id": "b", "body": {}}', "line 2: body.input"),
        (b'{"custom_id": "b", "url": "/v1/chat", "body": {}}', "line 1: url"),
        (lines(1, speed=9), "line 1: body.speed"),
        (lines(1, instructions="x" * 300_000), "line 1: it has 300"),
        (lines(1, junk=[0] * 100_001)[:-1].replace(b" ", b""), "line 1: the JSON has more than"),
        (lines(1, seed=float("nan")), "line 1: NaN is not JSON"),
        (lines(1).replace(b'"seed": 1', b'"seed": 1, "seed": 2'), "line 1: the field 'seed' is"),
        (lines(1).replace(b"csm-1b", b"\xff"), "line 1: not UTF-8"),
        (b"\n" * 200_000 + lines(1), "too many lines"),
    ],
)
def test_a_file_with_an_invalid_line_is_refused(server, data, message):
    response = server.post("/v1/batches", files={"file": ("lines.jsonl", data)})
    assert response.status_code == 400
    assert message in response.json()["detail"]


def test_a_line_is_stored_without_the_values_of_unknown_fields(server):
    """They would otherwise be read again each time. Their names are reported in the result."""
    data = lines(1, junk="x" * 200_000, instructions=None)
    batch = server.post("/v1/batches", files={"file": data}).json()

    def read(connection) -> list[tuple[str, str]]:
        query = "SELECT custom_id, body FROM lines WHERE batch = ?"
        return connection.execute(query, (batch["id"],)).fetchall()

    [(name, body)] = server.service.store.database.call(read)
    assert name == "line-0"
    given = json.loads(data)
    given["body"]["junk"] = True
    del given["body"]["instructions"]  # null is not given
    assert json.loads(body) == given
    [result] = results(server.url, wait(server.url, batch["id"]))
    assert "junk_ignored" in result["response"]["body"]["notices"].split(",")


def test_files_of_a_caller_are_read_a_few_at_a_time(server, monkeypatch):
    """Even if many small requests name the same file."""
    store, goes_on = server.service.store.batches, threading.Event()
    before, reading, most = store.read_file, [], []

    def read(file_id: str, owner: str) -> bytes | None:
        reading.append(file_id)
        most.append(len(reading))
        assert goes_on.wait(60)
        reading.pop()
        return before(file_id, owner)

    monkeypatch.setattr(store, "read_file", read)
    file = server.post("/v1/files", files={"file": lines(1)}).json()["id"]
    with ThreadPoolExecutor(20) as pool:
        body = {"input_file_id": file}
        asked = [pool.submit(server.post, "/v1/batches", json=body) for _ in range(20)]
        deadline = time.monotonic() + 60
        while server.service.request_limiter.num_acquired < 20:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.get("/healthz").status_code == 200
        goes_on.set()
        responses = [each.result() for each in asked]
    assert {response.status_code for response in responses} == {200}
    assert max(most) < len(os.sched_getaffinity(0)) + 4
    for response in responses:
        wait(server.url, response.json()["id"])
    assert server.service.request_limiter.num_acquired == 0


def test_unknown_ids_get_404(server):
    for path in ("/v1/batches/x", "/v1/files/x", "/v1/files/x/content"):
        assert server.get(path).status_code == 404
    assert server.post("/v1/batches/x/cancel").status_code == 404
    body = {"input_file_id": "file-x"}
    assert server.post("/v1/batches", json=body).status_code == 404


def test_a_cancelled_batch_stops_and_keeps_its_results(server):
    batch = server.post("/v1/batches", files={"file": lines(200)}).json()
    wait(server.url, batch["id"], lambda batch: batch["request_counts"]["completed"] > 2)
    cancelled = server.post(f"/v1/batches/{batch['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    server.wait_until_idle()
    done = server.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"]
    assert 2 < done < 200
    assert len(results(server.url, cancelled)) == done


def test_interactive_requests_go_first(server):
    """A slot is free for them during a long batch."""
    batch = server.post("/v1/batches", files={"file": lines(100)}).json()
    wait(server.url, batch["id"], lambda batch: batch["request_counts"]["completed"] > 2)
    engine = server.service.engine
    assert engine.num_running < engine.max_batch
    response = server.post("/generate", json={"text": "one two three", "seed": 1})
    assert response.status_code == 200
    counts = server.get(f"/v1/batches/{batch['id']}").json()["request_counts"]
    assert counts["completed"] < 100
    server.post(f"/v1/batches/{batch['id']}/cancel")


def test_a_batch_continues_after_a_restart(model, tmp_path):
    """The restart happens during the drain."""
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
def test_kill_9_neither_loses_nor_repeats_lines(tmp_path, seed):
    """Each line has exactly one result."""
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
        # uvicorn drains, and then raises the signal again.
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    assert [each["custom_id"] for each in found] == [f"line-{i}" for i in range(count)]
    assert all(each["error"] is None for each in found)


@pytest.mark.long
def test_kill_9_loses_no_queued_job(tmp_path):
    """Whether it was completed, running or waiting."""
    path = "/queue/fal-ai/csm-1b"
    process, url = start(tmp_path)
    scene = {"scene": [{"text": "one two three", "speaker_id": 0}] * 3, "seed": 1}
    jobs = [httpx.post(url + path, json=scene, timeout=60).json()["request_id"] for _ in range(8)]
    status = f"{url}{path}/requests/{jobs[0]}/status"
    deadline = time.monotonic() + 300
    while httpx.get(status, timeout=60).json()["status"] != "COMPLETED":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process, new_url = start(tmp_path)
    try:
        contents = set()
        for job in jobs:
            status = f"{new_url}{path}/requests/{job}/status"
            while httpx.get(status, timeout=60).json()["status"] != "COMPLETED":
                assert time.monotonic() < deadline + 300
                time.sleep(0.05)
            response = httpx.get(f"{new_url}{path}/requests/{job}", timeout=60)
            name = response.json()["audio"]["file_name"]
            contents.add(httpx.get(f"{new_url}/files/{name}", timeout=60).content)
    finally:
        process.terminate()
        process.wait(timeout=60)
    # One seed gives one recording in both processes.
    assert len(contents) == 1
    assert len(as_samples(*contents)) > 10_000


def start(data) -> tuple[subprocess.Popen, str]:
    """Starts the command, and waits until it responds."""
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


def test_stored_files_are_limited(model):
    limits = Limits(stored_bytes=350_000)
    with serve(model, Settings(**SMALL, limits=limits)) as running:
        files = {"file": ("a.jsonl", lines(1000))}
        responses = [running.post("/v1/files", files=files) for _ in range(3)]
        assert [response.status_code for response in responses] == [200, 429, 429]
        assert responses[1].json()["error"]["code"] == "storage_full"
        running.get("/v1/batches")
        httpx.delete(f"{running.url}/v1/files/{responses[0].json()['id']}").raise_for_status()
        assert running.post("/v1/files", files=files).status_code == 200


def test_results_wait_for_room_on_the_disk_and_no_line_runs_twice(
    model, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(database, "LAST_PAUSE", 0.2)
    generated = []
    before = batch_worker.as_request
    monkeypatch.setattr(
        batch_worker,
        "as_request",
        lambda service, caller, fields: (
            generated.append(fields.input) or before(service, caller, fields)
        ),
    )
    with (
        caplog.at_level(logging.WARNING, "csm_jax.serve"),
        serve(model, Settings(**SMALL, data=tmp_path), warm=False) as running,
    ):
        running.service.not_ready = None
        batch = running.post("/v1/batches", files={"file": lines(30)}).json()
        wait(running.url, batch["id"], lambda batch: batch["request_counts"]["completed"] > 3)
        limit_pages(running.service.store, 5)
        deadline = time.monotonic() + 60
        while not running.service.store.database.is_full:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        running.wait_until_idle()
        at_full, failures = len(generated), running.service.store.database.num_failures
        time.sleep(1)
        # It repeats the write without further log lines.
        assert running.service.store.database.num_failures > failures
        assert len(generated) == at_full
        assert running.post("/v1/files", files={"file": lines(500)}).status_code == 507
        assert running.get(f"/v1/batches/{batch['id']}").json()["status"] == "in_progress"
        assert results(running.url, batch)
        assert running.get("/readyz").json() == {"status": "ready", "storage": "full"}
        assert "csm_storage_full 1.0" in running.get("/metrics").text
        assert running.post("/generate", json={"text": "one"}).status_code == 200
        limit_pages(running.service.store, None)
        done = wait(running.url, batch["id"])
        found = results(running.url, done)
        assert "csm_storage_full 0.0" in running.get("/metrics").text
    assert [each["custom_id"] for each in found] == [f"line-{i}" for i in range(30)]
    assert sorted(generated, key=int) == [f"{i}" for i in range(30)]
    records = [record for record in caplog.records if "full" in record.message]
    assert len(records) == 1
    assert not any(record.exc_info for record in caplog.records)


def test_a_failing_worker_is_reported_once_and_continues(model, monkeypatch, caplog):
    monkeypatch.setattr(batch_worker, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(batch_worker, "LAST_PAUSE", 0.1)
    with (
        caplog.at_level(logging.ERROR, "csm_jax.serve"),
        serve(model, Settings(**SMALL), warm=False) as running,
    ):
        running.service.not_ready = None
        store = running.service.store.batches
        with monkeypatch.context() as patch:

            async def fail(running):
                raise RuntimeError("a bug")

            patch.setattr(store, "next_line", fail)
            batch = running.post("/v1/batches", files={"file": lines(2)}).json()
            time.sleep(1)
            response = running.get("/readyz")
            assert response.status_code == 503
            assert "a bug" in response.json()["detail"]
        wait(running.url, batch["id"])
        assert running.get("/readyz").status_code == 200
    assert len([record for record in caplog.records if "a bug" in record.message]) == 1


def test_the_error_names_one_invalid_line_of_50_000(server):
    data = lines(49_999) + b'{"custom_id": "b", "body": {"model": "csm-1b"}}'
    response = server.post("/v1/batches", files={"file": ("lines.jsonl", data)})
    assert response.status_code == 400
    assert response.json()["detail"].startswith("line 50000: body.")


def test_metadata_is_returned(server):
    data = {"metadata": {"who": "me"}}
    file = server.post("/v1/files", files={"file": lines(1)}).json()["id"]
    batch = server.post("/v1/batches", json=data | {"input_file_id": file}).json()
    assert batch["metadata"] == {"who": "me"}
    assert wait(server.url, batch["id"])["metadata"] == {"who": "me"}


def test_deleting_the_results_of_a_running_batch_ends_it(server):
    batch = server.post("/v1/batches", files={"file": lines(300)}).json()
    wait(server.url, batch["id"], lambda batch: batch["request_counts"]["completed"] > 1)
    url = f"{server.url}/v1/files/{batch['output_file_id']}"
    assert httpx.delete(url).status_code == 200
    server.wait_until_idle()
    assert server.get(f"/v1/batches/{batch['id']}").status_code == 404
    assert httpx.delete(url).status_code == 404


def test_the_openai_client_pages_through_batches(server):
    made = [server.post("/v1/batches", files={"file": lines(1)}).json()["id"] for _ in range(5)]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        listed = [each.id for each in client.batches.list(limit=2)]
        files = [each.id for each in client.files.list(limit=3)]
    assert listed[:5] == made[::-1]
    assert len(files) == len(set(files)) >= 10


def test_a_file_may_begin_with_a_byte_order_mark():
    """As some editors write it."""
    marked = _parse_lines(codecs.BOM_UTF8 + lines(2), Limits())
    assert [line.custom_id for line in marked] == ["line-0", "line-1"]
