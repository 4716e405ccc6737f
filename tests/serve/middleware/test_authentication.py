"""API keys, rate limits, body sizes and CORS of a server."""

import base64
import contextlib
import itertools
import socket

import httpx
import numpy as np
import pytest
from serving import SMALL, as_wav, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from csm_jax.serve.admission import rate_limits
from csm_jax.serve.admission.rate_limits import TokenBuckets
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits, Settings

KEYS = ("first-key", "second-key")
BODY_BYTES = 50_000
LIMITS = Limits(body_bytes=BODY_BYTES, json_bytes=BODY_BYTES)
# Seconds, which grow by a large step with each call.
CLOCK = itertools.count(0, 100)


@pytest.fixture(scope="module")
def guarded(model):
    settings = Settings(**SMALL, api_keys=KEYS, requests_per_minute=40, limits=LIMITS)
    with serve(model, settings) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh_rates(monkeypatch):
    """Each test starts with full buckets."""
    monkeypatch.setattr(rate_limits, "monotonic", CLOCK.__next__)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first-key"},
        {"Authorization": "bearer second-key"},
        {"Authorization": "Key first-key"},
        {"X-API-Key": "second-key"},
        {"xi-api-key": "first-key"},
    ],
)
def test_a_valid_key_is_accepted(guarded, headers):
    assert guarded.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer first-ke"},
        {"Authorization": "Bearer first-key,second-key"},
        {"Authorization": "Basic first-key"},
        {"X-API-Key": ""},
        {"X-API-Key": "\xff"},
        {"xi-api-key": "first-ke"},
        {"xi-api-key": "first-key", "X-API-Key": "first-key"},
    ],
)
def test_a_request_without_a_valid_key_gets_401(guarded, headers):
    for path in ("/v1/models", "/openapi.json", "/nowhere", "/v1/audio/voices/rms"):
        response = guarded.get(path, headers={k: v.encode("latin-1") for k, v in headers.items()})
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
        assert response.headers["www-authenticate"] == "Bearer"


def test_errors_of_keys_have_the_form_of_the_api(guarded):
    """Before the body is read: this one is not JSON."""
    response = guarded.post("/v1/text-to-speech/slt", content=b"{", headers={"xi-api-key": "no"})
    assert response.status_code == 401
    assert response.json()["detail"]["status"] == "invalid_api_key"
    assert response.json()["detail"]["message"] == response.json()["error"]["message"]


def test_probes_need_no_key(guarded):
    assert guarded.get("/healthz").status_code == 200
    assert guarded.get("/metrics").status_code == 200
    assert guarded.get("/readyz").status_code in (200, 503)


def test_websockets_need_a_key(guarded):
    url = guarded.url.replace("http", "ws") + "/v1/realtime"
    with pytest.raises((InvalidStatus, ConnectionClosed)), connect(url):
        pass
    for more in ({"additional_headers": {"Authorization": "Bearer first-key"}}, {}):
        target = url if more else f"{url}?api_key=first-key"
        with connect(target, **more) as talk:
            talk.send('{"type": "cancel"}')
            assert "cancelled" in talk.recv(timeout=10)


def test_the_key_of_a_websocket_is_not_logged(guarded, caplog):
    url = guarded.url.replace("http", "ws") + "/v1/realtime"
    for query in ("api_key=first-key", "a=b&api%5Fkey=first-key", "api_key=first-key2"):
        with (
            caplog.at_level("DEBUG"),
            contextlib.suppress(InvalidStatus),
            connect(f"{url}?{query}") as talk,
        ):
            talk.send('{"type": "cancel"}')
            talk.recv(timeout=10)
    named = [record for record in caplog.records if record.name.startswith(("uvicorn", "csm_jax"))]
    assert any("[accepted]" in record.getMessage() for record in named)
    assert not [record for record in named if "first-key" in record.getMessage()]


def test_rate_limits_apply_to_each_key(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rate_limits, "monotonic", lambda: now[0])
    rates = TokenBuckets(3, "requests")
    for _ in range(3):
        rates.count("a")
    with pytest.raises(ApiError) as raised:
        rates.count("a")
    assert (raised.value.status, raised.value.retry_after) == (429, 20)
    rates.count("b")
    now[0] = 20.0
    rates.count("a")
    with pytest.raises(ApiError):
        rates.count("a")
    now[0] = 1e6
    for _ in range(3):
        rates.count("a")
    with pytest.raises(ApiError):
        rates.count("a")


def test_the_number_of_remembered_callers_is_limited(monkeypatch):
    """A client with many addresses must not fill the memory."""
    monkeypatch.setattr(rate_limits, "MAX_CALLERS", 10)
    rates = TokenBuckets(3, "requests")
    for caller in range(1000):
        rates.count(str(caller))
    assert len(rates._buckets) == 10


def test_requests_beyond_the_rate_limit_get_429(guarded, monkeypatch):
    now = next(CLOCK)
    monkeypatch.setattr(rate_limits, "monotonic", lambda: now)
    headers = {"Authorization": "Bearer second-key"}
    statuses = [guarded.get("/v1/models", headers=headers).status_code for _ in range(41)]
    assert statuses == [200] * 40 + [429]
    refused = guarded.get("/v1/models", headers=headers)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


AUTHORIZED = {"Authorization": "Bearer first-key"}


def test_a_large_body_is_refused_by_its_content_length(guarded):
    """The refusal comes before the body is read."""
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer first-key\r\n"
        head += "Content-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 99999999999\r\n\r\n".encode())
        assert b" 413 " in connection.recv(1000)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *((path, "application/json") for path in ("/generate", "/v1/audio/speech", "/v1/files")),
        ("/fal-ai/csm-1b", "application/json"),
        *((path, "multipart/form-data; boundary=x") for path in ("/generate", "/v1/files")),
    ],
)
def test_a_large_body_is_refused_while_it_arrives(guarded, path, kind):
    """With a Content-Length, and in chunks without one."""

    def pieces():
        yield b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n'
        for _ in range(100):
            yield b"a" * 1000

    headers = AUTHORIZED | {"Content-Type": kind}
    response = httpx.post(guarded.url + path, content=pieces(), headers=headers, timeout=30)
    assert response.status_code == 413
    assert str(BODY_BYTES) in response.json()["detail"]


def test_pages_of_other_origins_are_refused(server):
    """CORS is off by default."""
    headers = {"Origin": "https://example.com", "Access-Control-Request-Method": "POST"}
    response = httpx.options(f"{server.url}/generate", headers=headers)
    assert "access-control-allow-origin" not in response.headers


WAV = base64.b64encode(as_wav(np.sin(np.arange(24_000, dtype=np.float32)))).decode()
LONG = "a" * 10_001
TURN = {"prompt": LONG, "audio_url": f"data:audio/wav;base64,{WAV}", "speaker_id": 0}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/generate", {"text": "one", "audio": WAV, "audio_text": LONG}),
        ("/v1/audio/voices", {"name": "a", "audio": WAV, "text": LONG}),
        ("/fal-ai/csm-1b", {"scene": [{"text": "one", "speaker_id": 0}], "context": [TURN]}),
    ],
)
def test_a_transcript_that_is_too_long_is_refused(server, path, fields):
    response = server.post(path, json=fields)
    assert response.status_code == 400
    assert "10001 characters, but at most 10000" in response.json()["detail"]


def test_allowed_origins_are_accepted(model):
    settings = Settings(**SMALL, cors_origins=("https://example.com",), api_keys=KEYS)
    with serve(model, settings) as running:
        for origin, allowed in {"https://example.com": True, "https://other.com": False}.items():
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            response = httpx.options(f"{running.url}/generate", headers=headers)
            assert ("access-control-allow-origin" in response.headers) == allowed
