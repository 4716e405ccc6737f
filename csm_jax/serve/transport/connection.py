"""One connection of a client, between the event loop's transport and uvicorn's protocol.

It hands data on in small pieces, so that a flood of tiny frames or chunks never blocks the event
loop for long, and it knows at any time whether the server waits for the client. `InputScheduler`
decides which connection is next.
"""

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
import typing
from collections import deque
from collections.abc import Callable
from typing import Any

from csm_jax.serve.errors import RETRY_AFTER, ApiError
from csm_jax.serve.settings import Limits
from csm_jax.serve.transport.connections import ConnectionGroup, Connections, Phase

# Bytes that the kernel buffers before the client has room for them.
_KERNEL_BYTES = 262_144
# Bytes that a transport buffers before its writer waits. For TLS asyncio's default is eight times
# that.
_BUFFER_BYTES = 65_536
# Bytes that a protocol receives at once, which take some milliseconds if they are tiny chunks.
_PIECE_BYTES = 8192
# Seconds in which the rest of a body may arrive after its response.
_LINGER_SECONDS = 5.0
# Seconds from the time limit of a body, which has the response 408, until the connection is cut.
_GRACE_SECONDS = 10.0


def _limit_kernel(connected: socket.socket | None) -> None:
    """Limits what the kernel buffers for a client that does not read.

    By default it buffers megabytes, which are minutes of speech.
    """
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None and connected is not None:
        with contextlib.suppress(OSError):  # such as a Unix socket
            connected.setsockopt(socket.IPPROTO_TCP, option, _KERNEL_BYTES)


class Protocol(typing.Protocol):
    """A protocol of uvicorn, with the properties that `server.py` adds.

    Attributes:
      phase: the state of the connection; only for HTTP.
      is_answered: whether the response is complete; only for HTTP.
      has_input: whether it has received input that `handle_events` is still to read.
    """

    @property
    def phase(self) -> Phase: ...
    @property
    def is_answered(self) -> bool: ...
    @property
    def has_input(self) -> bool: ...

    def handle_events(self) -> None: ...
    def connection_made(self, transport: "Connection") -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


def _num_queued(connected: Any) -> int:
    """Bytes in the kernel's send queue; 0 where that is unknown."""
    if connected is None:
        return 0
    try:
        size = fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return struct.unpack("i", size)[0]


class WritePace:
    """How fast a client reads, measured only while unsent bytes wait for it."""

    def __init__(self):
        self._taken = 0
        self._since: float | None = None

    def is_too_slow(self, now: float, taken: int, unsent: int, limits: Limits) -> bool:
        """Whether the client has read too little for too long.

        Args:
          taken, unsent: bytes that the client has read so far, and that wait for it.
        """
        if not unsent:
            self._since = None
            return False
        if self._since is None:
            self._since, self._taken = now, taken
        seconds = now - self._since
        if seconds < limits.write_seconds:
            return False
        is_slow = taken - self._taken < seconds * limits.response_bytes_per_second
        self._since, self._taken = now, taken
        return is_slow


class Connection(asyncio.Protocol):
    """One connection: a protocol for the event loop, and a transport for uvicorn's protocol.

    Attributes:
      phase, since: its state, and the time when that began.
      groups, share: the groups of `Connections` in which it is counted, and the client's share.
    """

    # Set when the event loop has connected it.
    _transport: asyncio.Transport

    def __init__(self, connections: Connections, make_protocol: Callable[[], Protocol]):
        self.phase = Phase.HEAD
        self.since = 0.0
        self.groups: list[ConnectionGroup] = []
        self.share: str | None = None
        self.connections = connections
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._accepted: socket.socket | None = None
        self._is_connected = False
        self._inner: Protocol | None = None
        self._pieces: deque[bytes] = deque()
        self._is_scheduled = False
        self._wants_more = True
        self._is_reading = True
        self._can_write = True
        self._is_tls = False
        self._written = 0
        self._pace = WritePace()

    # Called by the listener.

    def accept(self, accepted: socket.socket, host: str) -> bool:
        """Counts the connection, and returns whether it may begin.

        The time limit for its first head starts now.

        Args:
          accepted: its socket.
          host: address of the client.
        """
        self._accepted = accepted
        self.since = self._loop.time()
        return self.connections.admit(self, host)

    @property
    def refusal(self) -> bytes:
        """The response to a connection that may not begin."""
        error = ApiError(503, "too many connections", code="busy", retry_after=RETRY_AFTER)
        response = error.response("")  # nothing was read: no path is known
        headers = b"".join(b"%s: %s\r\n" % pair for pair in response.raw_headers)
        head = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n" + headers
        return head + b"\r\n" + response.body

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # The event loops pass a `Transport` for a stream of bytes.
        self._transport = transport = typing.cast(asyncio.Transport, transport)
        self._is_connected = True
        if self not in self.connections:
            transport.abort()
            return
        self._is_tls = transport.get_extra_info("sslcontext") is not None
        transport.set_write_buffer_limits(high=_BUFFER_BYTES)
        _limit_kernel(transport.get_extra_info("socket"))
        self._inner = self._make_protocol()
        self._inner.connection_made(self)

    def data_received(self, data: bytes) -> None:
        if self._inner is None:
            return
        if self.phase is Phase.IDLE:
            self._enter(Phase.HEAD)
        pieces = (data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES))
        self._pieces.extend(pieces)
        self._update_reading()

    def eof_received(self) -> None:
        if self._inner is not None:
            self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pieces.clear()
        self.connections.remove(self)
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._can_write = False
        if self._inner is not None:
            self._inner.pause_writing()
        self._update_reading()

    def resume_writing(self) -> None:
        self._can_write = True
        if self._inner is not None:
            self._inner.resume_writing()
        self._update_reading()

    # Called by uvicorn's protocols.

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        """Closes the connection without sending the unsent bytes."""
        if self._is_connected:
            self._transport.abort()
        elif self._accepted is not None:
            # The event loop owns the socket, and closes it when the handshake fails.
            with contextlib.suppress(OSError):
                self._accepted.shutdown(socket.SHUT_RDWR)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    @property
    def num_unsent(self) -> int:
        """Bytes that wait for the client.

        Under TLS the event loop has a second buffer, of unknown size. While that is not empty, the
        kernel's queue is not empty either.
        """
        unsent = self._transport.get_write_buffer_size()
        return unsent + _num_queued(self.get_extra_info("socket")) if self._is_tls else unsent

    def pause_reading(self) -> None:
        self._wants_more = False
        self._update_reading()

    def resume_reading(self) -> None:
        self._wants_more = True
        self._update_reading()

    def set_protocol(self, protocol: Protocol) -> None:
        """Replaces the protocol by that of a WebSocket."""
        self._inner = protocol
        self._enter(Phase.SOCKET)

    def update_phase(self, is_answered: bool = False) -> None:
        """Updates the phase after an action of the protocol.

        Args:
          is_answered: whether the action was the end of a response.
        """
        if self.phase is Phase.SOCKET or self._inner is None:
            return
        phase = self._inner.phase
        # The time limit of a head that has begun does not start again.
        is_head = phase is Phase.IDLE and self.phase is Phase.HEAD
        if is_answered or (phase is not self.phase and not is_head):
            self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        old, self.phase, self.since = self.phase, phase, self._loop.time()
        self.connections.update(self, old)

    def feed(self) -> None:
        """Hands on one piece. `InputScheduler` calls it."""
        self._is_scheduled = False
        if self._inner is None or not self._may_feed:
            return
        try:
            if self._pieces:
                self._inner.data_received(self._pieces.popleft())
            else:
                self._inner.handle_events()
        except Exception:
            # The state of a protocol after an unexpected error is unknown.
            self.abort()
        self.update_phase()
        self._update_reading()

    @property
    def _may_feed(self) -> bool:
        if self._inner is None or self.is_closing():
            return False
        has_input = bool(self._pieces) or self._inner.has_input
        return has_input and self._wants_more and self._can_write

    def _update_reading(self) -> None:
        """Reads from the client only while few pieces wait."""
        if self.is_closing():
            return
        # Nothing is read from a client that does not read its responses.
        should_read = self._wants_more and self._can_write and len(self._pieces) <= 1
        if should_read != self._is_reading:
            self._is_reading = should_read
            (self._transport.resume_reading if should_read else self._transport.pause_reading)()
        if self._may_feed and not self._is_scheduled:
            self._is_scheduled = True
            self.connections.input.add(self)

    def check(self, now: float) -> None:
        """Closes the connection if its client was too slow."""
        if self._is_connected:
            self.update_phase()
            unsent = self.num_unsent
            taken = self._written - unsent
            if self._pace.is_too_slow(now, taken, unsent, self.connections.limits):
                self.abort()
                return
        if now - self.since > self._phase_limit:
            self.abort()

    @property
    def _phase_limit(self) -> float:
        """Seconds that the phase may last."""
        limits = self.connections.limits
        match self.phase:
            case Phase.HEAD:
                return limits.head_seconds
            case Phase.IDLE:
                return limits.idle_seconds
            case Phase.BODY if self._inner is not None and self._inner.is_answered:
                return _LINGER_SECONDS
            case Phase.BODY:
                longest = limits.body_bytes / limits.body_bytes_per_second
                return limits.body_seconds + longest + _GRACE_SECONDS
        return float("inf")
