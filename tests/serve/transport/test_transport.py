"""Connections that keep the server waiting, and bytes that are no request: a real server around a
tiny application."""

import asyncio
import contextlib
import dataclasses
import resource
import socket
import threading
import time
import urllib.request
from collections.abc import Callable

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from csm_jax.serve.admission.caller import Caller, set_caller
from csm_jax.serve.middleware.response_limits import Responses
from csm_jax.serve.settings import Limits, Settings
from csm_jax.serve.transport import server as transport
from csm_jax.serve.transport.connections import Connections, Pace

LIMITS = Limits(
    connections=60,
    connections_per_address=40,
    head_seconds=1.0,
    idle_seconds=2.0,
    write_seconds=2.0,
    audio_bytes=30_000,
    pending_body_bytes=120_000,
)


# More than the buffers of the event loop and the kernel take.
WHOLE_BYTES = 16_000_000


class Application:
    """Answers with the length of the body; keeps what it has seen.

    `/large` is a response that exceeds all buffers, `/slow` one that takes a while, `/busy` one
    that keeps the event loop busy, `/pieces` one of which what was sent is counted, `/whole` one
    that is written at once, `/cut` one that `Responses` cuts into pieces.
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
            response = Responses(Response(bytes(WHOLE_BYTES)), Limits())
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
        """What uvicorn waits for when it stops."""
        return len(self.server.server_state.connections)

    def open(self, data: bytes = b"") -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        made.sendall(data)
        return made

    def ask(self, path: str = "/") -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return answer.read().decode()

    def ask_from(self, address: str) -> bytes:
        """The response to a client with another address."""
        where = ("127.0.0.1", self.port)
        with socket.create_connection(where, 10, source_address=(address, 0)) as made:
            made.sendall(REQUEST)
            return made.recv(10_000)

    def exchange(self, data: bytes, seconds: float = 2) -> bytes:
        """All that is answered to these bytes until the server closes, or is silent so long."""
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


@pytest.fixture(scope="module")
def running():
    with run() as made:
        yield made


@pytest.fixture
def opened(running):
    """Connections that are closed after the test."""
    made = []
    yield made
    for each in made:
        each.close()
    # What they have sent may take a while to be read.
    running.wait_for(0, seconds=30)


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
BODY = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize("begun", [b"", b"GET / HT", BODY], ids=["silent", "head", "body"])
def test_a_new_connection_gets_the_place_of_a_waiting_one(running, opened, begun):
    for _ in range(200):
        opened.append(running.open(begun))
    for _ in range(3):
        assert running.ask() == "0 bytes"
    assert len(running.connections) <= LIMITS.connections_per_address


def test_busy_connections_are_not_aborted_for_new_ones(running, opened):
    busy = REQUEST.replace(b"/ ", b"/slow ")
    opened += [running.open(busy) for _ in range(LIMITS.connections_per_address)]
    deadline = time.monotonic() + 5
    while running.app.paths.count(("GET", "/slow")) < LIMITS.connections_per_address:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    refused = running.exchange(REQUEST)
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in refused
    assert b"too many connections" in refused
    assert all(b"200 OK" in made.recv(1000) for made in opened)


def test_proxies_have_no_limit_of_their_own():
    with run(proxies=("127.0.0.0/8",)) as running:
        made = [running.open(b"GET") for _ in range(50)]
        running.wait_for(50)
        made += [running.open(b"GET") for _ in range(30)]
        running.wait_for(LIMITS.connections)
        assert running.ask() == "0 bytes"
        for each in made:
            each.close()


def test_a_head_that_drips_ends(running, opened):
    made = running.open(b"GET / HTTP/1.1\r\n")
    opened.append(made)
    started = time.monotonic()
    with contextlib.suppress(ConnectionError, TimeoutError):
        while time.monotonic() - started < 8:
            made.sendall(b"a")
            time.sleep(0.1)
            made.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                if not made.recv(10):
                    break
    assert 0.9 < time.monotonic() - started < 5


def test_an_idle_connection_is_closed(running, opened):
    made = running.open(REQUEST)
    opened.append(made)
    started = time.monotonic()
    made.settimeout(8)
    assert b"200 OK" in read_all(made)
    assert 1.5 < time.monotonic() - started < 7


def test_a_response_that_is_not_read_is_aborted(running, opened):
    opened.append(running.open(REQUEST.replace(b"/ ", b"/large ")))
    running.wait_for(1)
    closed = running.app.closed
    running.wait_for(0, seconds=10)
    deadline = time.monotonic() + 2
    while running.app.closed == closed:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_slow_reader_is_not_aborted(running, opened):
    """It is not the pace that ends a response, but that nothing is taken at all."""
    made = running.open(REQUEST.replace(b"/ ", b"/large "))
    opened.append(made)
    started, size = time.monotonic(), 0
    while time.monotonic() - started < 5:
        size += len(made.recv(4_000_000))
        time.sleep(0.1)
    assert size > 1_000_000
    assert len(running.connections) == 1


def test_a_response_longer_in_transit_than_the_idle_time_arrives(running, opened):
    """The connection is not idle before the client has the response, and is good for another."""
    made = running.open(REQUEST.replace(b"/ ", b"/whole "))
    opened.append(made)
    started, size = time.monotonic(), 0
    while size < WHOLE_BYTES:
        taken = len(made.recv(WHOLE_BYTES // 50))
        assert taken
        size += taken
        time.sleep(0.1 * taken / (WHOLE_BYTES // 50))
    assert time.monotonic() - started > 2 * LIMITS.idle_seconds
    made.sendall(REQUEST)
    assert b"200 OK" in made.recv(65_536)


@pytest.mark.parametrize(
    ("seconds", "num_bytes", "unsent", "is_ended"),
    [
        (29, 1, 100_000, True),
        (1, 1000, 100_000, True),
        (16, 65_536, 100_000, False),
        (10, 10, 0, False),
    ],
    ids=["drip", "slow", "player", "slow server"],
)
def test_a_response_must_be_taken_at_a_pace(seconds, num_bytes, unsent, is_ended):
    """A client takes some bytes every few seconds, for ten minutes."""
    pace, limits = Pace(), Limits()
    ends = [
        pace.is_too_slow(float(now), now // seconds * num_bytes, unsent, limits)
        for now in range(600)
    ]
    assert any(ends) == is_ended


@pytest.mark.parametrize("path", [b"/large", b"/whole"])
def test_one_that_takes_a_few_bytes_now_and_then_ends(running, opened, path):
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", running.port))
    opened.append(made)
    made.sendall(REQUEST.replace(b"/ ", path + b" "))
    running.wait_for(1)
    started = time.monotonic()
    while len(running.connections):
        assert time.monotonic() - started < 9
        made.recv(100)
        time.sleep(0.1)
    assert time.monotonic() - started > LIMITS.write_seconds


def test_a_stream_is_not_ended_for_the_pace_of_the_server(running):
    """It sends 100 bytes a second, and the client takes all of them."""
    assert len(running.exchange(REQUEST.replace(b"/ ", b"/dripping "), seconds=6)) > 500


def test_a_body_that_no_route_reads_ends(running, opened):
    made = running.open(BODY.replace(b"/ ", b"/unread "))
    opened.append(made)
    made.settimeout(10)
    started = time.monotonic()
    assert b"200 OK" in read_all(made)
    assert time.monotonic() - started < 8


def test_requests_in_one_packet_are_answered_in_order(running):
    two = REQUEST + BODY + b"a" * 1000 + REQUEST.replace(b"/ ", b"/c ")
    answer = running.exchange(two)
    assert answer.count(b"200 OK") == 3
    assert answer.index(b"0 bytes") < answer.index(b"1000 bytes")


def test_a_request_with_two_lengths_is_the_last_of_its_connection(running):
    """To one server on the way the second is a request, to another a part of the body."""
    head = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = running.exchange(head + b"0\r\n\r\n" + REQUEST.replace(b"/ ", b"/hidden "))
    assert answer.count(b"HTTP/1.1 ") == 1
    assert ("GET", "/hidden") not in running.app.paths


def test_the_kernel_takes_little_from_a_client_that_does_not_read(running, opened):
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", running.port))
    opened.append(made)
    made.sendall(REQUEST.replace(b"/ ", b"/pieces "))
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert running.app.sent < 1_000_000
        time.sleep(0.05)


CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\r\nX Y: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded: b\r\nA\x00: b\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 20_000,
        b"GET /" + b"a" * 100_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n" * 1000 + b"\x00",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"zz\r\n",
    ],
)
def test_malformed_requests_are_refused(running, data):
    seen = len(running.app.paths)
    answer = running.exchange(data)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 500 ")) or not answer
    assert b" 200 " not in answer
    assert len(running.app.paths) <= seen + data.startswith(CHUNKED)


def test_a_bad_chunk_ends_only_its_connection(running):
    """It ends that connection, and no other."""
    data = CHUNKED.replace(b"/ ", b"/unread ") + b"1\r\na\r\nzz\r\n"
    running.exchange(data)
    assert running.ask() == "0 bytes"


def assert_answers_in_time_beside(
    flood: Callable[[threading.Event], None], running: Running
) -> None:
    """Half of the requests beside a flood, which runs until its event is set, take below 1 s."""
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


def test_tiny_chunks_do_not_delay_other_requests(running, opened):
    def flood(stop: threading.Event) -> None:
        with contextlib.suppress(OSError), running.open(CHUNKED) as made:
            while not stop.is_set():
                made.sendall(b"1\r\na\r\n" * 40_000)

    assert_answers_in_time_beside(flood, running)


def test_tiny_chunks_on_many_connections_do_not_delay_other_clients():
    """What the connections of one client send is handed on in turn with what others send."""
    limits = dataclasses.replace(LIMITS, connections=400, connections_per_address=200)
    chunks = b"1\r\na\r\n" * 4000
    with run(limits) as running, contextlib.ExitStack() as stack:
        flooding = [stack.enter_context(running.open(CHUNKED)) for _ in range(150)]
        for made in flooding:
            made.settimeout(0)
        deadline, waits = time.monotonic() + 20, []
        while len(waits) < 5:
            for made in flooding:
                with contextlib.suppress(OSError):
                    made.sendall(chunks)
            started = time.monotonic()
            assert b" 200 " in running.ask_from("127.0.0.2")
            waits.append(time.monotonic() - started)
            assert time.monotonic() < deadline
        assert sorted(waits)[2] < 0.5


def test_requests_behind_others_do_not_delay_other_clients():
    """What answering a request takes is not known when it is read: few begin in one round."""
    limits = dataclasses.replace(LIMITS, connections=400, connections_per_address=200)
    with run(limits) as running, contextlib.ExitStack() as stack:
        flooding = [stack.enter_context(running.open()) for _ in range(150)]
        for made in flooding:
            made.sendall(REQUEST.replace(b"/ ", b"/busy ") * 30)
        time.sleep(0.5)
        started = time.monotonic()
        assert b" 200 " in running.ask_from("127.0.0.2")
        assert time.monotonic() - started < 1
        for made in flooding:
            made.settimeout(0.2)
            made.shutdown(socket.SHUT_RDWR)


UPGRADE = (
    b"GET /talk HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@pytest.mark.parametrize(
    "data",
    [
        UPGRADE.replace(b"GET", b"POST"),
        UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0"),
        UPGRADE[:-2] + b"Content-Length: 5\r\n\r\nhello",
        UPGRADE.replace(b"Version: 13", b"Version: 99"),
        UPGRADE.replace(b"AAAAAAAAAAAAAAAAAAAAAA==", b"A"),
    ],
)
def test_malformed_upgrades_open_no_websocket(running, data):
    answer = running.exchange(data)
    assert b" 101 " not in answer
    assert answer.startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize(
    "data",
    [
        UPGRADE[:-2] + b"A: b\r\n" * 200 + b"\r\n",
        UPGRADE[:-2] + b"A: " + b"b" * 9000 + b"\r\n\r\n",
        UPGRADE.replace(b"/talk", b"/" + b"a" * 9000),
    ],
    ids=["lines", "line", "target"],
)
def test_an_upgrade_with_too_large_a_head_is_refused_and_closed(running, opened, data):
    """h11 reads larger heads than websockets."""
    made = running.open(data)
    opened.append(made)
    made.settimeout(3)
    assert read_all(made).startswith(b"HTTP/1.1 4")
    running.wait_for(0)
    assert running.protocols == 0


def frame(opcode: int, payload: bytes = b"", is_last: bool = True) -> bytes:
    assert len(payload) < 126
    return bytes([opcode | 0x80 * is_last, 0x80 | len(payload)]) + bytes(4) + payload


@pytest.fixture
def talking(running, opened):
    """A WebSocket of bytes, after its handshake."""
    made = running.open(UPGRADE)
    opened.append(made)
    assert b" 101 " in made.recv(1000)
    return made


def test_a_fragmented_message_is_received(running, talking):
    talking.sendall(frame(1, b"one", False) + frame(9, b"ping") + frame(0, b"two"))
    time.sleep(0.2)
    assert running.app.messages[-1] == 6
    received = talking.recv(1000)
    assert b"ping" in received
    assert b"heard" in received


def test_a_message_has_only_so_many_frames(talking):
    with contextlib.suppress(ConnectionError):
        talking.sendall(frame(1, b"", False) + frame(0, b"", False) * 100_000)
    talking.settimeout(5)
    assert (1009).to_bytes(2, "big") in read_all(talking)


def test_a_message_is_no_larger_than_a_recording(running):
    with connect(f"ws://127.0.0.1:{running.port}/talk") as talk:
        talk.send("a" * 40_000)
        assert talk.recv(timeout=5) == "heard"
        assert not talk.protocol.extensions  # nothing is compressed
        with contextlib.suppress(ConnectionClosed):
            talk.send("a" * 200_000)
        with pytest.raises(ConnectionClosed) as raised:
            talk.recv(timeout=5)
        assert raised.value.rcvd.code == 1009


def test_unfinished_messages_of_all_have_a_limit(running, opened):
    """However many sockets they are sent on."""
    head = bytes([0x81, 0xFF]) + (60_000).to_bytes(8, "big") + bytes(4)
    for _ in range(5):
        made = running.open(UPGRADE)
        opened.append(made)
        assert b" 101 " in made.recv(1000)
        made.sendall(head + b"a" * 50_000)
    time.sleep(0.5)
    assert running.connections.messages._total <= LIMITS.pending_body_bytes + 60_000
    ended = 0
    for made in opened:
        made.settimeout(0.2)
        ended += bool(read_all(made))
    # Those that go beyond the limit, and perhaps one more: data comes in pieces of any size.
    assert 3 <= ended < len(opened)


def test_unfinished_messages_of_one_caller_leave_room_for_those_of_others(running, opened):
    head = bytes([0x81, 0xFF]) + (50_000).to_bytes(8, "big") + bytes(4)
    for _ in range(5):
        made = running.open(UPGRADE.replace(b"/talk", b"/many"))
        opened.append(made)
        assert b" 101 " in made.recv(1000)
        made.sendall(head + b"a" * 49_000)
    time.sleep(0.5)
    other = running.open(UPGRADE)
    opened.append(other)
    assert b" 101 " in other.recv(1000)
    other.sendall(head + b"a" * 50_000)
    assert b"heard" in other.recv(1000)


def test_pings_without_reading_fill_no_memory(running, talking):
    """A client that does not read the pongs is not read either, and is aborted in the end."""
    started, sent = time.monotonic(), 0
    talking.settimeout(0.5)
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - started < 15:
            with contextlib.suppress(TimeoutError):
                sent += talking.send(frame(9, b"a" * 100) * 1000)
    assert time.monotonic() - started < 14
    assert sent < 100_000_000


def test_pings_do_not_delay_other_requests(running, opened):
    def flood(stop: threading.Event) -> None:
        with contextlib.suppress(OSError), running.open(UPGRADE) as made:
            made.settimeout(0.05)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    made.sendall(frame(9) * 10_000)
                with contextlib.suppress(TimeoutError):
                    made.recv(1_000_000)

    assert_answers_in_time_beside(flood, running)


def test_the_file_limit_is_raised_or_a_warning_logged(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 100_000))
    assert transport.raise_file_limit(Limits()).connections == 8192
    assert asked == [(8192 + 512, 100_000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert transport.raise_file_limit(Limits()).connections == 4096 - 512
    assert "at most 3584 connections" in caplog.text
