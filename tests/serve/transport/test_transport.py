"""Connections that keep the server waiting, and bytes that are not requests."""

import contextlib
import dataclasses
import resource
import socket
import threading
import time

import pytest
from raw_server import (
    BODY,
    LIMITS,
    REQUEST,
    WHOLE_BYTES,
    assert_answers_in_time_beside,
    read_all,
    run,
)

from csm_jax.serve.settings import Limits
from csm_jax.serve.transport import server as transport
from csm_jax.serve.transport.connection import WritePace


@pytest.mark.parametrize("begun", [b"", b"GET / HT", BODY], ids=["silent", "head", "body"])
def test_a_new_connection_replaces_the_longest_waiting_one(running, opened, begun):
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


def test_the_limit_per_address_does_not_apply_to_proxies():
    with run(proxies=("127.0.0.0/8",)) as running:
        made = [running.open(b"GET") for _ in range(50)]
        running.wait_for(50)
        made += [running.open(b"GET") for _ in range(30)]
        running.wait_for(LIMITS.connections)
        assert running.ask() == "0 bytes"
        for each in made:
            each.close()


def test_a_slow_head_is_closed(running, opened):
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
    """A slow pace does not close a response; a standstill does."""
    made = running.open(REQUEST.replace(b"/ ", b"/large "))
    opened.append(made)
    started, size = time.monotonic(), 0
    while time.monotonic() - started < 5:
        size += len(made.recv(4_000_000))
        time.sleep(0.1)
    assert size > 1_000_000
    assert len(running.connections) == 1


def test_a_response_longer_in_transit_than_the_idle_time_arrives(running, opened):
    """The idle time starts after the client has the response; then another request can follow."""
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
    """A client reads some bytes every few seconds, for ten minutes."""
    pace, limits = WritePace(), Limits()
    ends = [
        pace.is_too_slow(float(now), now // seconds * num_bytes, unsent, limits)
        for now in range(600)
    ]
    assert any(ends) == is_ended


@pytest.mark.parametrize("path", [b"/large", b"/whole"])
def test_a_client_that_reads_a_few_bytes_at_a_time_is_closed(running, opened, path):
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


def test_a_slow_stream_of_the_server_is_not_closed(running):
    """It sends 100 bytes a second, and the client reads all of them."""
    assert len(running.exchange(REQUEST.replace(b"/ ", b"/dripping "), seconds=6)) > 500


def test_a_connection_with_an_unread_body_is_closed(running, opened):
    made = running.open(BODY.replace(b"/ ", b"/unread "))
    opened.append(made)
    made.settimeout(10)
    started = time.monotonic()
    assert b"200 OK" in read_all(made)
    assert time.monotonic() - started < 8


def test_requests_in_one_packet_are_answered_in_order(running):
    two = REQUEST + BODY + b"a" * 1000 + REQUEST.replace(b"/ ", b"/c ")
    response = running.exchange(two)
    assert response.count(b"200 OK") == 3
    assert response.index(b"0 bytes") < response.index(b"1000 bytes")


def test_a_request_with_two_lengths_is_the_last_of_its_connection(running):
    """One proxy would treat the second as a request, another as a part of the body."""
    head = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    response = running.exchange(head + b"0\r\n\r\n" + REQUEST.replace(b"/ ", b"/hidden "))
    assert response.count(b"HTTP/1.1 ") == 1
    assert ("GET", "/hidden") not in running.app.paths


def test_the_kernel_buffers_little_for_a_client_that_does_not_read(running, opened):
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
    response = running.exchange(data)
    assert response.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 500 ")) or not response
    assert b" 200 " not in response
    assert len(running.app.paths) <= seen + data.startswith(CHUNKED)


def test_a_bad_chunk_closes_only_its_connection(running):
    """It ends that connection, and no other."""
    data = CHUNKED.replace(b"/ ", b"/unread ") + b"1\r\na\r\nzz\r\n"
    running.exchange(data)
    assert running.ask() == "0 bytes"


@pytest.mark.long
def test_tiny_chunks_do_not_delay_other_requests(running, opened):
    def flood(stop: threading.Event) -> None:
        with contextlib.suppress(OSError), running.open(CHUNKED) as made:
            while not stop.is_set():
                made.sendall(b"1\r\na\r\n" * 40_000)

    assert_answers_in_time_beside(flood, running)


def test_tiny_chunks_on_many_connections_do_not_delay_other_clients():
    """The connections of one client take turns with those of others."""
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
        assert sorted(waits)[2] < 1


def test_requests_behind_others_do_not_delay_other_clients():
    """The cost of a request is not known when it is read, so few begin in one round."""
    limits = dataclasses.replace(LIMITS, connections=400, connections_per_address=200)
    with run(limits) as running, contextlib.ExitStack() as stack:
        flooding = [stack.enter_context(running.open()) for _ in range(150)]
        for made in flooding:
            made.sendall(REQUEST.replace(b"/ ", b"/busy ") * 30)
        time.sleep(0.5)
        started = time.monotonic()
        assert b" 200 " in running.ask_from("127.0.0.2")
        assert time.monotonic() - started < 4  # of 13 s for all that was sent
        for made in flooding:
            made.settimeout(0.2)
            made.shutdown(socket.SHUT_RDWR)


def test_the_file_limit_is_raised_or_a_warning_logged(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 100_000))
    assert transport.raise_file_limit(Limits()).connections == 8192
    assert asked == [(8192 + 512, 100_000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert transport.raise_file_limit(Limits()).connections == 4096 - 512
    assert "at most 3584 connections" in caplog.text
