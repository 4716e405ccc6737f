"""A real server around a tiny application, and clients that send raw bytes."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
import urllib.request
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from csm_jax.serve.admission.caller import Caller, set_caller
from csm_jax.serve.middleware.response_limits import ResponseLimitMiddleware
from csm_jax.serve.settings import Limits, Settings
from csm_jax.serve.transport import server as transport
from csm_jax.serve.transport.connections import Connections

LIMITS = Limits(
    connections=60,
    connections_per_address=40,
    head_seconds=1.0,
    idle_seconds=2.0,
    write_seconds=2.0,
    audio_bytes=30_000,
    pending_body_bytes=120_000,
)


# More than the buffers of the event loop and the kernel hold.
WHOLE_BYTES = 16_000_000


class Application:
    """Responds with the length of the body, and records the requests.

    `/large` is a response that exceeds all buffers, `/slow` one that takes a while, `/busy` one
    that keeps the event loop busy, `/pieces` one of which what was sent is counted, `/whole` one
    that is written at once, `/cut` one that `ResponseLimitMiddleware` cuts into pieces.
    """

    def __init__(self):
        self.paths, self.messages, self.closed, self.sent = [], [], 0, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": f"{message['type']}.complete"})
            return
        self.paths.append((scope.get("method"), scope["path"]))
        if scope["type"] == "websocket":
            await self._talk(WebSocket(scope, receive, send))
            return
        request = Request(scope, receive)
        if scope["path"] == "/large":
            response = StreamingResponse(self._chunks())
        elif scope["path"] == "/cut":
            response = ResponseLimitMiddleware(Response(bytes(WHOLE_BYTES)), Limits())
        elif scope["path"] == "/whole":
            response = Response(bytes(WHOLE_BYTES))
        elif scope["path"] == "/dripping":
            response = StreamingResponse(self._drops())
        elif scope["path"] == "/pieces":
            response = StreamingResponse(self._pieces())
        else:
            body = b"" if scope["path"] == "/unread" else await request.body()
            if scope["path"] == "/busy":
                time.sleep(0.003)
            if scope["path"] == "/slow":
                await asyncio.sleep(3)
            response = PlainTextResponse(f"{len(body)} bytes")
        await response(scope, receive, send)

    async def _chunks(self):
        try:
            for _ in range(1000):
                yield b"a" * 1_000_000
        finally:
            self.closed += 1

    async def _drops(self):
        for _ in range(50):
            yield b"a" * 10
            await asyncio.sleep(0.1)

    async def _pieces(self):
        for _ in range(1000):
            yield b"a" * 10_000
            self.sent += 10_000

    async def _talk(self, talk: WebSocket) -> None:
        set_caller(talk, Caller(share=talk.url.path))
        await talk.accept()
        with contextlib.suppress(WebSocketDisconnect):
            while (message := await talk.receive())["type"] != "websocket.disconnect":
                self.messages.append(len(message.get("text") or message.get("bytes") or b""))
                await talk.send_text("heard")


@dataclasses.dataclass
class Running:
    app: Application
    port: int
    server: transport.Server

    @property
    def connections(self) -> Connections:
        return self.server._connections

    @property
    def protocols(self) -> int:
        """The number of protocols for which uvicorn waits when it stops."""
        return len(self.server.server_state.connections)

    def open(self, data: bytes = b"") -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        made.sendall(data)
        return made

    def ask(self, path: str = "/") -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            return response.read().decode()

    def ask_from(self, address: str) -> bytes:
        """The response to a client with another address."""
        where = ("127.0.0.1", self.port)
        with socket.create_connection(where, 10, source_address=(address, 0)) as made:
            made.sendall(REQUEST)
            return made.recv(10_000)

    def exchange(self, data: bytes, seconds: float = 2) -> bytes:
        """Sends bytes, and returns everything until the server closes or pauses for so long."""
        with self.open(data) as made:
            made.settimeout(seconds)
            return read_all(made)

    def wait_for(self, number: int, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while len(self.connections) != number:
            assert time.monotonic() < deadline, len(self.connections)
            time.sleep(0.02)


def read_all(made: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while piece := made.recv(65536):
            data += piece
    return data


@contextlib.contextmanager
def run(limits: Limits = LIMITS, loop: str = "auto", proxies: tuple[str, ...] = (), **more):
    """A server in a thread, with arguments `more` of `make_server`."""
    app = Application()
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    settings = Settings(limits=limits, drain_seconds=3, trusted_proxies=proxies)
    server = transport.make_server(app, settings, **more)
    server.config.loop = loop
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(app, listening.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join()


def assert_answers_in_time_beside(
    flood: Callable[[threading.Event], None], running: Running
) -> None:
    """Half of the requests during a flood, which runs until its event is set, take below 1 s."""
    stop = threading.Event()
    thread = threading.Thread(target=flood, args=(stop,))
    thread.start()
    try:
        waits = []
        for _ in range(10):
            started = time.monotonic()
            assert running.ask() == "0 bytes"
            waits.append(time.monotonic() - started)
        assert sorted(waits)[5] < 1
    finally:
        stop.set()
        thread.join()


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
