"""Connections of https, from the moment when they are accepted, with both event loops."""

import contextlib
import importlib.util
import ssl
import threading
import time

import pytest
from raw_server import LIMITS, REQUEST, WHOLE_BYTES, Running, run

LOOPS = ["asyncio"] + ["uvloop"] * (importlib.util.find_spec("uvloop") is not None)


@pytest.fixture(params=LOOPS)
def running(request, certificates):
    names = {f"ssl_{name}file": str(certificates / f"{name}.pem") for name in ("cert", "key")}
    with run(loop=request.param, **names) as made:
        yield made


@pytest.fixture
def context(certificates):
    return ssl.create_default_context(cafile=str(certificates / "ca.pem"))


def connect(running: Running, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(running.open(), server_hostname="localhost")


def ask(running: Running, context: ssl.SSLContext) -> bytes:
    with connect(running, context) as made:
        made.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        data = b""
        while piece := made.recv(65_536):
            data += piece
        return data


def test_connections_without_a_handshake_are_counted(running, context):
    """They make room for one another, and are closed after the time limit of a head."""
    silent = [running.open() for _ in range(200)]
    for _ in range(3):
        assert ask(running, context).endswith(b"0 bytes")
    assert len(running.connections) <= LIMITS.connections_per_address
    running.wait_for(0, seconds=LIMITS.head_seconds + 3)
    for each in silent:
        with each:
            each.settimeout(2)
            with contextlib.suppress(ConnectionError):
                assert each.recv(1) == b""


def test_many_requests_at_once_are_answered(running, context):
    """Heads that arrive together with the end of the handshake are not lost."""
    responses = []

    def work() -> None:
        responses.extend(ask(running, context)[-7:] for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert responses == [b"0 bytes"] * 80


def test_a_response_longer_in_transit_than_the_idle_time_arrives(running, context):
    with connect(running, context) as made:
        made.sendall(REQUEST.replace(b"/ ", b"/cut "))
        started, size = time.monotonic(), 0
        while size < WHOLE_BYTES:
            taken = len(made.recv(65_536))
            assert taken
            size += taken
            time.sleep(5.0 * taken / WHOLE_BYTES)
        assert time.monotonic() - started > 2 * LIMITS.idle_seconds
        made.sendall(REQUEST)
        assert b"200 OK" in made.recv(65_536)


def test_a_connection_that_does_not_read_is_closed(running, context):
    with connect(running, context) as made:
        made.sendall(REQUEST.replace(b"/ ", b"/cut "))
        running.wait_for(1)
        running.wait_for(0, seconds=10)


def test_a_connection_without_a_valid_handshake_is_closed(running):
    with running.open(b"GET / HTTP/1.1\r\n\r\n") as made, contextlib.suppress(ConnectionError):
        made.settimeout(2)
        assert b"200" not in made.recv(1000)
    running.wait_for(0)
