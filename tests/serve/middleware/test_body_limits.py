"""Size and time limits of request bodies, and strict parsing."""

import asyncio
import json
import time
import tracemalloc
from typing import Annotated

import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel, FailFast, Field
from small import ask

from csm_jax.serve import errors
from csm_jax.serve.admission.memory import MemoryBudget
from csm_jax.serve.api import parsing
from csm_jax.serve.api.schemas import Recording
from csm_jax.serve.errors import ApiError
from csm_jax.serve.middleware.body_limits import BodyLimitMiddleware
from csm_jax.serve.settings import Limits


class Small(BaseModel):
    text: str
    speed: float = Field(1.0, allow_inf_nan=False)
    turns: Annotated[list[dict], FailFast()] = Field([], max_length=64)


class Large(Small):
    audio: Recording | None = None


LIMITS = Limits(json_bytes=1000, body_bytes=40_000_000, pending_body_bytes=100_000_000)


def application(limits: Limits = LIMITS) -> FastAPI:
    app = FastAPI()

    @app.post("/small")
    async def small(http: Request) -> dict:
        return (await parsing.read_fields(http, Small)).model_dump()

    @app.post("/large", openapi_extra=parsing.describe(Large, forms=True))
    async def large(http: Request) -> dict:
        fields = await parsing.read_fields(http, Large, recordings=True, forms=True)
        audio = fields.audio if fields.audio is not None else ""
        return {"text": fields.text, "audio": len(audio), "kind": type(audio).__name__}

    errors.install(app)
    parsing.document(app)
    app.add_middleware(BodyLimitMiddleware, limits=limits)
    return app


APP = application()
AS_JSON = {"Content-Type": "application/json"}


def post(path: str, body: bytes, kind: str | None = "application/json", app=APP):
    headers = {} if kind is None else {"Content-Type": kind}
    return ask(app, path, "POST", content=body, headers=headers)


def test_json_is_read():
    assert post("/small", b'{"text": "a", "speed": 2}').json()["speed"] == 2
    assert post("/small", b'{"text": "a"}', "application/json; charset=UTF-8").status_code == 200


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (None, "Content-Type"),
        ("", "Content-Type"),
        ("text/plain", "text/plain"),
        ("application/json; charset=latin-1", "latin-1"),
        ("multipart/form-data; boundary=x", "application/json"),
        ("application/x-www-form-urlencoded", "application/json"),
        ("application/jsonx", "application/jsonx"),
    ],
)
def test_json_needs_its_type(kind, message):
    response = post("/small", b'{"text": "a"}', kind)
    assert response.status_code == 415
    assert message in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"text": "a"} x', "not JSON"),
        (b'{"text": "a", "text": "b"}', "'text' is there twice"),
        (b'{"text": "a", "turns": [{"a": 1, "a": 2}]}', "'a' is there twice"),
        (b'{"text": "a", "te\\u0078t": "b"}', "'text' is there twice"),
        (b'{"text": "a", "speed": NaN}', "NaN is not JSON"),
        (b'{"text": "a", "x": -Infinity}', "-Infinity is not JSON"),
        (b'{"text": "a", "speed": 1e999}', "speed: "),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
        (b"\xef\xbb\xbf", "not JSON"),
        (b'\xef\xbb\xbf\xef\xbb\xbf{"text": "a"}', "not JSON"),
        (b'{"text": "\\ud800"}', "JSON"),
        (b"[" * 900, "not JSON|nested"),
        (b'{"text": "a", "x": ' + b"9" * 900 + b"9}", "more than 400 digits"),
        (b"[]", "object|dict"),
        (b"null", "object|dict"),
        (b'{"speed": 1}', "text: Field required"),
    ],
)
def test_invalid_json_gets_400_with_a_message_of_one_line(body, message):
    response = post("/small", body)
    assert response.status_code == 400
    detail = response.json()["detail"]
    assert any(part in detail for part in message.split("|")), detail
    assert "\n" not in detail
    assert len(detail) < 500


@pytest.mark.parametrize("body", [{"text": "a"}, {"text": "\ufeffa", "speed": 1}])
def test_json_may_begin_with_a_byte_order_mark(body):
    """The editor of Windows and .NET write one; only the first is a mark."""
    encoded = json.dumps(body, ensure_ascii=False).encode("utf-8-sig")
    plain = json.dumps(body).encode()
    assert post("/small", encoded).json() == post("/small", plain).json()
    assert post("/small", encoded).status_code == 200


def test_errors_quote_the_request_briefly():
    name = "x" * 300
    for body in ({"text": name, "speed": name}, {name: 1}, {"text": [name]}):
        assert len(post("/small", json.dumps(body).encode()).text) < 600


def test_the_size_limit_is_smaller_without_recordings():
    body = json.dumps({"text": "a" * 2000}).encode()
    assert post("/small", body).status_code == 413
    assert post("/large", body).status_code == 200
    # With and without a Content-Length.
    response = ask(APP, "/small", "POST", content=iter_pieces(body), headers=AS_JSON)
    assert response.status_code == 413


async def iter_pieces(body: bytes, size: int = 100):
    for start in range(0, len(body), size):
        yield body[start : start + size]


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"text": "a", "turns": [{}] * 1_000_000}).encode(),
        json.dumps({"text": "a", "ignored": "a" * 30_000_000}).encode(),
        json.dumps({"text": "a", "ignored": [0] * 10_000_000}).encode(),
        json.dumps({"text": "a", "turns": [{"a": i} for i in range(40_000)]}).encode(),
        b'{"text": "a", "ignored": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        b'{"text": "a", "ignored": ' + b"9" * 30_000_000 + b"}",
    ],
)
def test_hostile_json_blocks_neither_the_event_loop_nor_memory(body):
    """Measures the longest pause of the event loop, and the memory that parsing adds.

    A parser on the event loop, or one that makes all of these values, pauses it for 6 to 9 s.
    `examples/attack.py` measures the pauses of a server.
    """
    kind = parsing.TypeAdapter(Large)

    async def scenario() -> float:
        longest, done = 0.0, asyncio.Event()

        async def watch() -> None:
            nonlocal longest
            while not done.is_set():
                started = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - started)

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0)
        try:
            await parsing.parse_json(kind, body, LIMITS)
        except ApiError:
            pass
        finally:
            done.set()
            await watching
        return longest

    assert min(asyncio.run(scenario()) for _ in range(3)) < 1.0
    tracemalloc.start()
    try:
        asyncio.run(scenario())
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body)
    finally:
        tracemalloc.stop()


HEAD = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
FORM = "multipart/form-data; boundary=x"


def part(name: bytes, value: bytes, more: bytes = b"") -> bytes:
    return HEAD % (name, more) + value + b"\r\n"


FILE = part(b"audio", b"\xff\x00", b'; filename="a.flac"')


def test_a_form_is_read():
    response = post("/large", part(b"text", b"one") + FILE + b"--x--\r\n", FORM)
    assert response.json() == {"text": "one", "audio": 2, "kind": "bytes"}
    empty = part(b"audio", b"", b'; filename=""')
    response = post("/large", part(b"text", b"one") + empty + b"--x--", FORM)
    assert response.json()["kind"] == "str"
    response = post("/large", b"text=on%65&audio=AAAA", "application/x-www-form-urlencoded")
    assert response.json() == {"text": "one", "audio": 4, "kind": "str"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (part(b"text", b"one"), "ends before its last boundary"),
        (part(b"text", b"one") + FILE[:-6], "ends before its last boundary"),
        (part(b"text", b"one") + b"--x", "ends before its last boundary"),
        (part(b"text", b"one") + b"--x-", "ends before its last boundary"),
        (b"", "ends before its last boundary"),
        (b"\r\n" * 10_000, "ends before its last boundary"),
        (part(b"text", b"one") * 2 + b"--x--", "'text' is there twice"),
        (part(b"text", b"one") + part(b"text", b"") + b"--x--", "'text' is there twice"),
        (part(b"text", b"\xff") + b"--x--", "text is not UTF-8"),
        (part(b"\xff", b"a") + b"--x--", "a name is not UTF-8"),
        (b"--x\r\n\r\na\r\n--x--", "no name"),
        (b"".join(part(b"f%d" % i, b"a") for i in range(65)) + b"--x--", "more than 64 fields"),
        (b"--x\r\nA: b\r\nA: c\r\n\r\na\r\n--x--", "there twice"),
        (b"--x\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(99)), "not a form"),
    ],
)
def test_a_damaged_form_is_refused(body, message):
    response = post("/large", body, FORM)
    assert response.status_code == 400
    assert message in response.json()["detail"]


def test_a_malformed_urlencoded_form_is_refused():
    kind = "application/x-www-form-urlencoded"
    for body in (b"text", b"text=a&text=b", b"text=%FF", b"text=\xff", b"text=a&" * 70):
        assert post("/large", body, kind).status_code == 400
    assert post("/large", b"text=" + b"%41" * 1000, kind).status_code == 413


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_form_needs_a_boundary(kind):
    assert "boundary" in post("/large", b"", kind).json()["detail"]


def test_the_openapi_document_contains_all_models():
    document = APP.openapi()
    schema = document["paths"]["/large"]["post"]["requestBody"]["content"]
    assert set(schema) == {"application/json", "multipart/form-data"}


def call(app, pieces, headers=(), pause: float = 0.0) -> int:
    """The status of a request whose body arrives in pieces, with a pause before each."""

    async def work() -> int:
        queue = list(pieces)
        status = []

        async def receive():
            await asyncio.sleep(pause)
            body = queue.pop(0) if queue else b""
            return {"type": "http.request", "body": body, "more_body": bool(queue)}

        async def send(message):
            if message["type"] == "http.response.start":
                status.append(message["status"])

        scope = {"type": "http", "method": "POST", "path": "/large", "headers": list(headers)}
        scope |= {"query_string": b"", "client": ("10.0.0.1", 1)}
        await app(scope, receive, send)
        return status[0]

    return asyncio.run(work())


AS_JSON_HEADER = (b"content-type", b"application/json")


def test_a_slow_body_gets_408():
    limits = Limits(body_seconds=0.5, body_bytes_per_second=100)
    body = [bytes([each]) for each in b'{"text": "' + b"a" * 9000 + b'"}']
    started = time.monotonic()
    assert call(application(limits), body, [AS_JSON_HEADER], pause=0.05) == 408
    assert time.monotonic() - started < 20
    # A body at the minimum rate may take longer.
    pieces = [b'{"text": "', *[b"a" * 1000] * 10, b'"}']
    assert call(application(limits), pieces, [AS_JSON_HEADER], pause=0.1) == 200


def test_two_content_lengths_are_refused():
    length, chunked = (b"content-length", b"5"), (b"transfer-encoding", b"chunked")
    for headers in ([length, chunked], [length, length], [(b"content-length", b"+5")]):
        assert call(APP, [b"hello"], [AS_JSON_HEADER, *headers]) == 400


def test_the_memory_of_all_bodies_is_limited():
    held = MemoryBudget(1000, "request bodies")
    held.add("a", 400)
    with pytest.raises(ApiError, match="your request bodies") as raised:
        held.check("a", 200)
    assert raised.value.status == 429
    held.check("b", 200)
    held.add("b", 500)
    with pytest.raises(ApiError, match="too many request bodies") as raised:
        held.check("c", 200)
    assert (raised.value.status, raised.value.retry_after) == (503, 1)
    held.add("a", -400)
    held.check("c", 200)


def test_the_memory_of_a_body_is_released():
    app = BodyLimitMiddleware(application_without_bodies(), LIMITS)
    for body in (b'{"text": "a"}', b"{", b"a" * 2000):
        call(app, [body[:1], body[1:]], [AS_JSON_HEADER])
    assert app._budget._total == 0
    assert not app._budget._shares


def application_without_bodies() -> FastAPI:
    app = FastAPI()

    @app.post("/large")
    async def large(http: Request) -> dict:
        return (await parsing.read_fields(http, Small)).model_dump()

    errors.install(app)
    return app


def test_a_body_is_not_kept_in_memory_after_parsing():
    """A response can take minutes, so the body must be released before."""
    held, app = [], FastAPI()

    @app.post("/large")
    async def large(http: Request) -> dict:
        tracemalloc.start()
        fields = await parsing.read_fields(http, Small, recordings=True)
        await asyncio.sleep(0.1)  # the thread that has parsed it drops it
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        return fields.model_dump()

    errors.install(app)
    limits = Limits(json_bytes=10_000_000)
    body = b'{"text": "a", "unknown": "' + b"b" * 5_000_000 + b'"}'
    pieces = [body[i : i + 100_000] for i in range(0, len(body), 100_000)]
    assert call(BodyLimitMiddleware(app, limits), pieces, [AS_JSON_HEADER]) == 200
    assert held[0] < 1_000_000
