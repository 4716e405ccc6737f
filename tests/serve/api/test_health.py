"""Health probes, metrics, overload, and the end of the server."""

import asyncio
import threading
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import SMALL, as_samples, serve

from csm_jax import Engine, Request
from csm_jax.inference.request_state import RequestState
from csm_jax.serve.settings import Settings

# Generates until it is cancelled, at most 20 s.
LONG = {"text": "one two three four five six " * 4, "temperature": 5, "seed": 1}
LONG |= {"max_audio_length_ms": 20_000}


@pytest.fixture(scope="module", autouse=True)
def compiled(server):
    """No time limit of these tests includes that of the compiler."""
    for body in (LONG | {"streaming": True}, {"text": "one"}):
        assert server.post("/generate", json=body).status_code == 200


def figures(server) -> dict[str, float]:
    return {
        sample.name + "".join(f",{v}" for v in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(server.get("/metrics").text)
        for sample in family.samples
    }


def test_healthz_succeeds_before_readyz(model, monkeypatch):
    finished = threading.Event()
    monkeypatch.setattr(Engine, "warm_up", lambda self, *_: finished.wait(60))
    with serve(model, Settings(**SMALL), warm=None) as running:
        assert running.get("/healthz").json() == {"status": "ok"}
        response = running.get("/readyz")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "not_ready"
        finished.set()
        deadline = time.monotonic() + 60
        while (response := running.get("/readyz")).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert response.json()["status"] == "ready"


def test_a_failed_warm_up_is_reported_by_readyz(model, monkeypatch, caplog):
    """In one line of the log, and by the probe."""

    def fail(self, *_: object) -> None:
        raise RuntimeError("out of memory\nand so on")

    monkeypatch.setattr(Engine, "warm_up", fail)
    with serve(model, Settings(**SMALL), warm=None) as running:
        deadline = time.monotonic() + 30
        while "failed" not in (response := running.get("/readyz")).text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert response.status_code == 503
        assert "the warm-up failed: out of memory" in response.json()["detail"]
        assert running.get("/healthz").status_code == 200
    lines = [message for message in caplog.messages if "warm-up" in message]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert not [record for record in caplog.records if record.exc_info]


def test_an_engine_that_has_stopped_is_reported(model):
    with serve(model, Settings(**SMALL), warm=False) as running:
        running.service.engine.close()
        for path in ("/healthz", "/readyz"):
            response = running.get(path)
            assert response.status_code == 503
            assert "the engine has stopped" in response.json()["detail"]


def test_metrics_count_requests_and_speech(server):
    before = figures(server)
    response = server.post("/generate", json={"text": "one two", "streaming": True})
    seconds = len(as_samples(response.content)) / 24_000
    server.post("/generate", json={"text": ""})
    after = figures(server)

    def change(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert change("csm_http_requests_total,/generate,200") == 1
    assert change("csm_http_requests_total,/generate,400") == 1
    assert change("csm_audio_seconds_total") == pytest.approx(seconds)
    assert change("csm_time_to_first_audio_seconds_count") == 1
    assert change("csm_real_time_factor_count") == 1
    for stage in ("context", "queue", "prefill", "frames", "codec"):
        assert change(f"csm_stage_seconds_count,{stage}") == 1
    assert change("csm_stage_seconds_sum,frames") > 0
    assert after["csm_batch_size"] == SMALL["max_batch"]
    assert after["csm_batch_occupancy"] == after["csm_queue_length"] == 0


def test_unknown_paths_share_one_metrics_label(server):
    for i in range(5):
        server.get(f"/nowhere-{i}")
    assert not [name for name in figures(server) if "nowhere" in name]
    assert figures(server)["csm_http_requests_total,other,404"] >= 5


async def hold(url: str, until: asyncio.Event, started: list) -> int:
    """Sends a long request, and disconnects when the event is set."""
    async with httpx.AsyncClient(timeout=60) as client:
        body = LONG | {"streaming": True}
        async with client.stream("POST", f"{url}/generate", json=body) as response:
            started.append(response.status_code)
            if response.status_code == 200:
                await until.wait()
            return response.status_code


def test_a_full_queue_gets_429(model):
    """A request gets 429 and Retry-After when all slots and permits are in use."""
    settings = Settings(**SMALL, max_queue=2)

    async def scenario(running) -> list[int]:
        until, started, waiting = asyncio.Event(), [], []
        engine = running.service.engine
        # One by one, because six at once could fill the queue before the slots.
        for count in range(1, 7):
            waiting.append(asyncio.create_task(hold(running.url, until, started)))
            async with asyncio.timeout(30):
                while engine.num_running + engine.num_waiting < count:
                    await asyncio.sleep(0.02)
        async with httpx.AsyncClient() as client:
            refused = await client.post(f"{running.url}/generate", json=LONG)
        until.set()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return refused

    with serve(model, settings) as running:
        refused = asyncio.run(scenario(running))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        running.wait_until_idle(seconds=5)


def test_a_slow_reader_does_not_delay_other_requests(server):
    """A client that does not read its response does not keep its slot."""
    with httpx.stream("POST", f"{server.url}/generate", json=LONG | {"streaming": True}) as slow:
        assert slow.status_code == 200
        started = time.monotonic()
        for _ in range(3):
            assert server.post("/generate", json={"text": "one"}).status_code == 200
        assert time.monotonic() - started < 10
        server.wait_until_idle()
        assert len(b"".join(slow.iter_bytes())) > 100_000


def test_a_running_response_is_finished_when_the_server_ends(model):
    """No response is cut off if it ends within the drain time."""
    responses = []
    with serve(model, Settings(**SMALL)) as running:

        def ask() -> None:
            responses.append(running.post("/generate", json=LONG | {"streaming": True}))

        thread = threading.Thread(target=ask)
        thread.start()
        while not running.service.engine.num_running:
            time.sleep(0.01)
    thread.join()
    assert responses[0].status_code == 200
    assert len(as_samples(responses[0].content)) / 24_000 > 1


def test_a_failed_request_does_not_affect_others(server, monkeypatch):
    """Only that request gets the error."""
    accept = RequestState.accept

    def accept_or_fail(self, codes, attention=None):
        if self._request.text == "seven":
            raise RuntimeError("broken")
        return accept(self, codes, attention)

    monkeypatch.setattr(RequestState, "accept", accept_or_fail)
    expected = server.service.model.generate(Request("one two", seed=2))
    responses = {}

    def ask(text: str) -> None:
        responses[text] = server.post("/generate", json={"text": text, "seed": 2})

    threads = [threading.Thread(target=ask, args=(text,)) for text in ("one two", "seven")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert responses["seven"].status_code == 503
    assert "broken" in responses["seven"].json()["detail"]
    assert len(as_samples(responses["one two"].content)) == len(expected)


@pytest.mark.long
def test_requests_during_the_warm_up_do_not_make_the_server_ready(model):
    """The queue is full of them, and the warm-up waits."""
    settings = Settings(max_batch=1, max_queue=1, max_seq_len=128)
    with serve(model, settings, warm=None) as running:
        statuses = []
        while running.get("/readyz").status_code != 200:
            asks = [threading.Thread(target=_ask_briefly, args=(running, statuses)) for _ in "123"]
            for thread in asks:
                thread.start()
            for thread in asks:
                thread.join()
        assert {200, 429} == set(statuses)


def _ask_briefly(running, statuses: list[int]) -> None:
    body = {"text": "one", "max_audio_length_ms": 400}
    statuses.append(running.post("/generate", json=body).status_code)


def test_a_server_whose_engine_has_ended_reports_503(model):
    with serve(model, Settings(**SMALL), warm=None) as running:
        assert running.get("/healthz").status_code == 200
        running.service.engine.close()
        assert running.get("/healthz").status_code == 503
        assert running.get("/readyz").status_code == 503
