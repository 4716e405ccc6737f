"""WebSockets that keep the server waiting, and bytes that are not messages."""

import contextlib
import threading
import time

import pytest
from raw_server import LIMITS, assert_answers_in_time_beside, read_all
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

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
    response = running.exchange(data)
    assert b" 101 " not in response
    assert response.startswith(b"HTTP/1.1 ")


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
    """The socket of a WebSocket after its handshake."""
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


def test_the_number_of_frames_in_a_message_is_limited(talking):
    with contextlib.suppress(ConnectionError):
        talking.sendall(frame(1, b"", False) + frame(0, b"", False) * 100_000)
    talking.settimeout(5)
    assert (1009).to_bytes(2, "big") in read_all(talking)


def test_the_size_of_a_message_is_limited(running):
    with connect(f"ws://127.0.0.1:{running.port}/talk") as talk:
        talk.send("a" * 40_000)
        assert talk.recv(timeout=5) == "heard"
        assert not talk.protocol.extensions  # nothing is compressed
        with contextlib.suppress(ConnectionClosed):
            talk.send("a" * 200_000)
        with pytest.raises(ConnectionClosed) as raised:
            talk.recv(timeout=5)
        assert raised.value.rcvd.code == 1009


def test_incomplete_messages_of_all_websockets_are_limited(running, opened):
    """The limit holds for all WebSockets together."""
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
    # Those beyond the limit, and perhaps one more, because data arrives in pieces of any size.
    assert 3 <= ended < len(opened)


def test_incomplete_messages_of_one_caller_leave_room_for_others(running, opened):
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


def test_pings_of_a_client_that_does_not_read_take_no_memory(running, talking):
    """The server stops reading from a client that does not read the pongs, and closes it later."""
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
