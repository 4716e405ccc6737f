"""Responses whose clients do not read: their memory is limited, and they keep their permits."""

import asyncio
import json
import logging

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from csm_jax.serve.admission.caller import Caller, set_caller
from csm_jax.serve.admission.concurrency import RequestLimiter
from csm_jax.serve.api.responses import PermitResponse
from csm_jax.serve.errors import StorageError
from csm_jax.serve.metrics import Metrics
from csm_jax.serve.middleware.request_log import RequestLogMiddleware
from csm_jax.serve.middleware.response_limits import PIECE_BYTES, ResponseLimitMiddleware
from csm_jax.serve.middleware.security_headers import SecurityHeadersMiddleware
from csm_jax.serve.settings import Limits
from csm_jax.serve.store import Store
from csm_jax.serve.store.blobs import PIECE_BYTES as STORED_PIECE_BYTES
from csm_jax.serve.store.blobs import Blob

BODY = bytes(range(256)) * 1000
LIMITS = Limits(pending_response_bytes=3 * len(BODY))


class Client:
    """The client of one response, which accepts so many messages, and then no more."""

    def __init__(self, takes: float = float("inf")):
        self.takes = takes
        self.messages: list[dict] = []

    async def send(self, message: dict) -> None:
        if len(self.messages) >= self.takes:
            await asyncio.Event().wait()
        self.messages.append(message)

    async def receive(self) -> dict:
        await asyncio.Event().wait()

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(each["body"] for each in self.messages[1:])


def scope_of(share: str = "a", path: str = "/", **headers: str) -> dict:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": pairs}
    set_caller(Request(scope), Caller(share=share))
    return scope


async def pieces():
    yield BODY
    yield b"end"


RESPONSES = {
    "bytes": lambda: Response(BODY),
    "json": lambda: JSONResponse("a" * len(BODY)),
    "stream": lambda: StreamingResponse(pieces()),
}


@pytest.mark.parametrize("make", RESPONSES.values(), ids=RESPONSES)
def test_a_response_arrives_in_small_pieces(make):
    async def work() -> None:
        plain, cut = Client(), Client()
        await make()(scope_of(), plain.receive, plain.send)
        await ResponseLimitMiddleware(make(), LIMITS)(scope_of(), cut.receive, cut.send)
        assert cut.messages[0] == plain.messages[0]
        assert cut.body == plain.body
        assert max(len(each["body"]) for each in cut.messages[1:]) <= PIECE_BYTES
        more = [each.get("more_body", False) for each in cut.messages[1:]]
        assert more == [True] * (len(more) - 1) + [False]

    asyncio.run(work())


def test_the_memory_of_unread_responses_is_limited():
    """One share gets half of the memory; small responses are never refused."""

    async def work() -> None:
        app = ResponseLimitMiddleware(Response(BODY), LIMITS)
        tasks = []

        async def ask(share: str, takes: float = 2) -> Client:
            client = Client(takes)
            tasks.append(asyncio.create_task(app(scope_of(share), client.receive, client.send)))
            await asyncio.sleep(0.01)
            return client

        assert [(await ask(share)).status for share in "aabbcd"] == [200, 429, 200, 429, 200, 503]
        small = Client()
        app._app = Response(b"small")
        await app(scope_of("d"), small.receive, small.send)
        assert small.status == 200
        app._app = Response(BODY)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        taken = await ask("a", float("inf"))
        assert taken.body == BODY

    asyncio.run(work())


def test_a_permit_is_kept_until_the_response_has_been_sent():
    async def work() -> None:
        limiter = RequestLimiter(4)
        with await limiter.acquire(Caller(share="a")) as permit:
            response = PermitResponse(permit, BODY)
        client = Client(takes=3)
        app = ResponseLimitMiddleware(response, LIMITS)
        task = asyncio.create_task(app(scope_of(), client.receive, client.send))
        await asyncio.sleep(0.01)
        assert limiter.num_acquired == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert limiter.num_acquired == 0

    asyncio.run(work())


def test_stored_files_are_read_in_pieces():
    data = BODY * 3

    async def work() -> None:
        store = Store(None, Limits())
        try:
            upload = await store.batches.add_file("a", "input.jsonl", data)
            download = await store.downloads.add("a", data, "audio/wav", "wav")
            for read in (
                lambda: store.batches.read_upload(upload),
                lambda: store.downloads.read(download),
            ):
                found = [piece async for piece in read()]
                assert b"".join(found) == data
                assert max(map(len, found)) <= STORED_PIECE_BYTES
        finally:
            store.close()

    asyncio.run(work())


def test_a_file_deleted_during_a_read_never_becomes_another_file():
    """SQLite reuses its row number for the next file, which belongs to another owner."""

    async def work() -> None:
        store = Store(None, Limits())
        try:
            upload = await store.batches.add_file("a", "input.jsonl", BODY * 3)
            blob = Blob("uploads", ("file", upload.id), upload.num_bytes)
            reading = blob.pieces(store.database)
            assert await anext(reading) == (BODY * 3)[:STORED_PIECE_BYTES]
            await store.batches.delete_file(upload.id, "a")
            await store.batches.add_file("b", "input.jsonl", b"b" * len(BODY) * 3)
            with pytest.raises(StorageError):
                await anext(reading)
        finally:
            store.close()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("cors_origins", "headers", "policy"),
    [
        ((), {}, b"same-origin"),
        (("https://a.example",), {}, b"same-origin"),
        (("https://a.example",), {"Access-Control-Allow-Origin": "https://a.example"}, None),
        (("*",), {}, None),
    ],
)
def test_pages_of_other_sites_do_not_embed_responses(cors_origins, headers, policy):
    client = Client()
    app = SecurityHeadersMiddleware(Response(BODY, headers=headers), cors_origins)
    asyncio.run(app(scope_of(), client.receive, client.send))
    assert client.headers.get(b"cross-origin-resource-policy") == policy


@pytest.mark.parametrize("path", ["/files/secret-name.wav", "/speech/files/secret-name.wav"])
def test_names_of_downloads_are_not_logged(caplog, path):
    caplog.set_level(logging.INFO, "csm_jax.serve")
    client = Client()
    app = RequestLogMiddleware(Response(BODY), Metrics())
    asyncio.run(app(scope_of(path=path), client.receive, client.send))
    assert "secret-name" not in caplog.text
    assert json.loads(caplog.messages[-1])["path"].endswith("/files/[redacted]")
