"""The real `fal-client` against a server with a certificate, because it uses https only."""

import asyncio
import base64
import json
import os
import ssl
import subprocess
import sys
import textwrap
import time

import httpx
import numpy as np
import pytest
from hearing import median_pitch, recognize_digits
from serving import SMALL, as_samples, serve

from csm_jax.evaluate.word_errors import count_errors
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.admission.concurrency import StreamLimiter
from csm_jax.serve.api import fal
from csm_jax.serve.errors import ApiError
from csm_jax.serve.jobs.runner import Job, Status
from csm_jax.serve.settings import Settings

APP = "fal-ai/csm-1b"
SCENE = [{"text": "one two three", "speaker_id": 0}, {"text": "four five six", "speaker_id": 1}]


@pytest.fixture(scope="module")
def secure(model, certificates):
    files = {f"ssl_{name}file": str(certificates / f"{name}.pem") for name in ("cert", "key")}
    with serve(model, Settings(**SMALL, api_keys=("id:secret",)), **files) as running:
        yield running


@pytest.fixture(scope="module")
def call(secure, certificates):
    """Runs Python code with `fal_client` in a separate process, which prints JSON."""
    host = secure.url.removeprefix("https://")
    environment = os.environ | {
        "FAL_RUN_HOST": host,
        "FAL_QUEUE_RUN_HOST": f"{host}/queue",
        "FAL_KEY": "id:secret",
        "SSL_CERT_FILE": str(certificates / "ca.pem"),
    }

    def run(lines: str, **values):
        code = f"import fal_client, json, httpx\nAPP = {APP!r}\n"
        code += "".join(f"{name} = {value!r}\n" for name, value in values.items())
        code += textwrap.dedent(lines)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def download(url: str, certificates) -> bytes:
    """A download needs no key."""
    trust = ssl.create_default_context(cafile=certificates / "ca.pem")
    response = httpx.get(url, verify=trust)
    assert response.status_code == 200
    return response.content


def test_a_scene_becomes_a_file(call, certificates):
    response = call(
        "print(json.dumps(fal_client.run(APP, arguments=ARGS)))", ARGS={"scene": SCENE, "seed": 3}
    )
    audio = response["audio"]
    data = download(audio["url"], certificates)
    assert audio["file_size"] == len(data)
    assert audio["content_type"] == "audio/wav"
    assert audio["file_name"].endswith(".wav")
    words = " ".join(turn["text"] for turn in SCENE).split()
    assert count_errors(words, recognize_digits(as_samples(data), 24_000)).errors <= 2


def test_a_scene_can_be_queued_and_fetched(call, certificates):
    """Submits, follows with logs, and fetches by the client."""
    response = call(
        """
        handle = fal_client.submit(APP, arguments=ARGS)
        states = [type(state).__name__ for state in handle.iter_events(with_logs=True)]
        last = handle.status(with_logs=True)
        print(json.dumps({"states": states, "logs": last.logs, "metrics": last.metrics,
                          "result": handle.get()}))
        """,
        ARGS={"scene": SCENE, "seed": 3},
    )
    assert response["states"][-1] == "Completed"
    assert set(response["states"]) <= {"Queued", "InProgress", "Completed"}
    messages = [log["message"] for log in response["logs"]]
    assert messages[1:] == ["line 1 of 2 spoken", "line 2 of 2 spoken", "done"]
    assert response["metrics"]["inference_time"] > 0
    assert len(as_samples(download(response["result"]["audio"]["url"], certificates))) > 20_000


def test_subscribe_with_a_context(call, certificates, recording, transcript):
    """The speech has the voice of the context."""
    url = "data:audio/flac;base64," + base64.b64encode(recording).decode()
    context = [{"prompt": transcript, "audio_url": url, "speaker_id": 0}]
    response = call(
        "print(json.dumps(fal_client.subscribe(APP, arguments=ARGS)))",
        ARGS={"scene": SCENE[:1], "context": context, "seed": 1},
    )
    audio = as_samples(download(response["audio"]["url"], certificates))
    assert median_pitch(audio, 24_000) < 130


def test_a_queued_scene_can_be_cancelled(call, secure):
    response = call(
        """
        handle = fal_client.submit(APP, arguments=ARGS)
        handle.cancel()
        try:
            handle.get()
        except fal_client.client.FalClientHTTPError as error:
            print(json.dumps([error.status_code, str(error)]))
        """,
        ARGS={"scene": [{"text": "one two three " * 20, "speaker_id": 0}] * 8},
    )
    assert response[0] == 400
    assert "cancelled" in response[1]
    secure.wait_until_idle(seconds=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scene": []}, "scene"),
        ({"scene": [{"text": "", "speaker_id": 0}]}, "text"),
        ({"scene": SCENE, "context": [{"prompt": "a", "audio_url": "http://x/"}]}, "not fetched"),
        ({"scene": SCENE, "context": [{"prompt": "a", "audio_url": "data:,a"}]}, "data URI"),
        ({"scene": SCENE * 40}, "at most 64"),
    ],
)
def test_errors_are_those_that_fal_clients_expect(call, arguments, message):
    lines = """
    try:
        fal_client.run(APP, arguments=ARGS)
    except fal_client.client.FalClientHTTPError as error:
        print(json.dumps([error.status_code, str(error)]))
    """
    status, output = call(lines, ARGS=arguments)
    assert status == 400
    assert message in output


def test_a_request_without_a_key_gets_401(secure, certificates):
    for headers in ({}, {"Authorization": "Key id:wrong"}, {"Authorization": "id:secret"}):
        response = httpx.post(
            f"{secure.url}/{APP}",
            json={"scene": SCENE},
            headers=headers,
            verify=ssl.create_default_context(cafile=certificates / "ca.pem"),
        )
        assert response.status_code == 401


def test_earlier_lines_are_context_of_the_next(server):
    """The second line differs from the same line alone, with any seed."""
    fields = {"scene": SCENE, "seed": 5}
    url = server.post(f"/{APP}", json=fields).json()["audio"]["url"]
    whole = as_samples(httpx.get(url).content)
    first = server.post("/generate", json={"text": SCENE[0]["text"], "seed": 5}).content
    np.testing.assert_allclose(whole[: len(as_samples(first))], as_samples(first), atol=1e-4)
    second = {"text": SCENE[1]["text"], "speaker": 1, "seed": 6}
    alone = as_samples(server.post("/generate", json=second).content)
    rest = whole[len(as_samples(first)) :]
    assert len(rest) != len(alone) or np.abs(rest - alone).max() > 0.01


def test_job_states_can_be_streamed(server):
    response = server.post(f"/queue/{APP}", json={"scene": SCENE}).json()
    with httpx.stream("GET", f"{response['status_url']}/stream?logs=1", timeout=60) as events:
        states = [json.loads(line[6:]) for line in events.iter_lines() if line]
    assert states[-1]["status"] == "COMPLETED"
    assert httpx.get(response["response_url"]).json()["audio"]["file_size"] > 20_000
    assert httpx.put(response["cancel_url"]).status_code == 400


def test_responses_name_their_request_and_unknown_fields(server):
    """The JavaScript client reads the id from a header of the result."""
    scene = {"scene": [{"text": "one", "mood": "glad"}], "max_audio_length_ms": 240}
    direct = server.post(f"/{APP}", json=scene, headers={"X-Request-ID": "mine"})
    assert direct.headers["x-fal-request-id"] == direct.headers["x-request-id"]
    long = {"scene": [{"text": "one " * 3000}]}
    for body, status in ((scene, 200), (long, 400)):
        queued = server.post(f"/queue/{APP}", json=body)
        job = queued.json()
        deadline = time.monotonic() + 60
        while httpx.get(job["status_url"]).json()["status"] != "COMPLETED":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        result = httpx.get(job["response_url"])
        assert (result.status_code, result.headers["x-fal-request-id"]) == (
            status,
            job["request_id"],
        )
        if status == 200:
            assert queued.headers["x-notices"] == direct.headers["x-notices"] == "mood_ignored"


def test_unknown_ids_get_404(server):
    for path in (f"/queue/{APP}/requests/x", f"/queue/{APP}/requests/x/status", "/files/x.wav"):
        assert server.get(path).status_code == 404


def a_job(status: Status = Status.RUNNING) -> Job:
    return Job("id", Caller(share="a"), "fal", status=status)


class FakeRunner:
    """A fake runner in which this job is active."""

    def __init__(self, is_job_active: bool = True):
        self.is_job_active = is_job_active

    def is_active(self, job: Job) -> bool:
        return self.is_job_active


def test_a_stream_of_states_waits_for_changes_without_polling(monkeypatch):
    async def scenario() -> None:
        job, asked = a_job(), []
        monkeypatch.setattr(fal, "_QUEUE_SECONDS", 60)

        def state() -> dict:
            asked.append(1)
            return {"status": job.status.value}

        states = fal._job_states(FakeRunner(), job, state)
        assert "IN_PROGRESS" in await anext(states)
        following = asyncio.ensure_future(anext(states))
        await asyncio.sleep(0.5)
        assert len(asked) <= 3
        job.set_status(Status.COMPLETED)
        assert "COMPLETED" in await asyncio.wait_for(following, 5)
        assert [event async for event in states] == []

    asyncio.run(scenario())


@pytest.mark.parametrize(("holds", "seconds"), [(False, 600), (True, 0.1)])
def test_a_stream_of_states_has_a_time_limit(holds, seconds):
    """When the job is left to the next process, and after the time limit."""

    async def scenario() -> None:
        states = fal._job_states(
            FakeRunner(holds), a_job(), lambda: {"status": "IN_PROGRESS"}, seconds
        )
        async with asyncio.timeout(5):
            assert len([event async for event in states]) == 1

    asyncio.run(scenario())


def test_streams_of_states_are_limited_per_caller():
    async def scenario() -> None:
        followers, caller, sent = StreamLimiter(1, "streams"), Caller(share="a"), []

        async def endless():
            yield "data: {}\n\n"
            await asyncio.sleep(3600)

        async def receive() -> dict:
            await asyncio.sleep(3600)

        async def send(message: dict) -> None:
            sent.append(message)

        def follow():
            return fal.JobStatesResponse(followers, caller, endless())(
                {"type": "http"}, receive, send
            )

        first = asyncio.create_task(follow())
        await asyncio.sleep(0.05)
        sent.clear()
        with pytest.raises(ApiError, match="1 streams of yours") as error:
            await follow()
        assert error.value.status == 429
        assert not sent
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        with followers.opened(caller):
            pass

    asyncio.run(scenario())
