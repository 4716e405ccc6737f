"""Connections of clients: how many there may be, and how long each may keep the server waiting.

A `Connection` stands between the event loop's transport and uvicorn's protocol. It hands on what
comes in small pieces, so that a flood of tiny frames or chunks never holds the event loop for
long, and it knows at any time what the connection waits for. `InputScheduler` says whose piece is
next.
"""

import asyncio
import contextlib
import enum
import fcntl
import itertools
import socket
import struct
import termios
import typing
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from csm_jax.serve.admission.memory import Held
from csm_jax.serve.errors import RETRY_AFTER, ApiError
from csm_jax.serve.network.addresses import is_proxy, network_of
from csm_jax.serve.settings import Limits
from csm_jax.serve.transport.input_scheduler import InputScheduler

# Bytes that the kernel takes before the client has room for them.
_KERNEL_BYTES = 262_144
# Bytes that a transport holds before its writer waits. For TLS asyncio would take eight times that.
_BUFFER_BYTES = 65_536
# Connections that are looked at whether they have been sent their responses, when room is needed.
_LOOKED_AT = 16
# Bytes that a protocol is given at once: of tiny chunks, some milliseconds of work.
_PIECE = 8192
# Seconds in which the rest of a body may come that has been answered already.
_LINGER_SECONDS = 5.0
# Seconds beyond those of a body, after which the connection is cut if there was no response (408).
_GRACE_SECONDS = 10.0


class Phase(enum.Enum):
    """What a connection is doing. In all but the last two the server waits for its client.

    A client in `WRITING` is bounded by the pace at which it takes the response.
    """

    HEAD = "the head of a request is not complete"
    IDLE = "between two requests"
    BODY = "the body of a request is not complete"
    WRITING = "a response is complete, but not sent yet"
    BUSY = "a request is being answered"
    SOCKET = "a WebSocket"


class Group:
    """Connections that are counted together.

    Attributes:
      size: how many there are.
      waiting: those whose clients are waited for, oldest first, for each of these phases.
    """

    def __init__(self):
        self.size = 0
        self.waiting: dict[Phase, dict[Connection, None]] = {
            phase: {} for phase in (Phase.HEAD, Phase.IDLE, Phase.BODY, Phase.WRITING)
        }

    def moved(self, connection: "Connection", old: Phase | None, new: Phase | None) -> None:
        """Notes the phase of a connection; None is before it came and after it went."""
        self.size += (old is None) - (new is None)
        if old in self.waiting:
            del self.waiting[old][connection]
        if new in self.waiting:
            self.waiting[new][connection] = None

    def longest_waiting(self) -> "Connection | None":
        """The connection that makes room for a new one: rather one without a request."""
        # Those that have been sent their responses by now wait for their clients again.
        for connection in list(itertools.islice(self.waiting[Phase.WRITING], _LOOKED_AT)):
            connection.settle()
        heads = [next(iter(self.waiting[phase]), None) for phase in (Phase.HEAD, Phase.IDLE)]
        found = [connection for connection in heads if connection]
        if found:
            return min(found, key=lambda connection: connection.since)
        return next(iter(self.waiting[Phase.BODY]), None)


class Connections:
    """All connections of a server, from the moment that they are accepted.

    Attributes:
      input: schedules what they have received.
      messages: counts the bytes of WebSocket messages that are not complete.
    """

    def __init__(self, limits: Limits, proxies: Sequence[str] = ()):
        """Starts without connections.

        Args:
          proxies: addresses and networks whose connections are those of many clients.
        """
        self.limits = limits
        self.input = InputScheduler()
        self.messages = Held(limits.pending_body_bytes, "messages")
        self._proxies = proxies
        self._all: set[Connection] = set()
        self._total = Group()
        self._groups: dict[str, Group] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, connection: "Connection") -> bool:
        return connection in self._all

    def admit(self, connection: "Connection", host: str) -> bool:
        """Admits a connection, if need be in the place of one whose client is waited for."""
        groups = [self._total]
        if not is_proxy(host, self._proxies):
            connection.share = network_of(host)
            group = self._groups.get(connection.share) or Group()
            if not self._make_room(group, self.limits.connections_per_address):
                return False
            groups.append(group)
        if not self._make_room(self._total, self.limits.connections):
            return False
        if connection.share is not None:
            # Perhaps again: it may have gone with the connection that made room.
            self._groups[connection.share] = groups[-1]
        connection.groups = groups
        self._all.add(connection)
        for group in connection.groups:
            group.moved(connection, None, connection.phase)
        return True

    def _make_room(self, group: Group, limit: int) -> bool:
        if group.size < limit:
            return True
        if (longest := group.longest_waiting()) is None:
            return False
        longest.abort()
        self.remove(longest)
        return True

    def remove(self, connection: "Connection") -> None:
        """Forgets a connection. A second call changes nothing."""
        if connection not in self._all:
            return
        self._all.remove(connection)
        for group in connection.groups:
            group.moved(connection, connection.phase, None)
        if (group := self._groups.get(connection.share)) and not group.size:
            del self._groups[connection.share]

    def moved(self, connection: "Connection", old: Phase) -> None:
        """Notes that the phase of a connection has changed."""
        if connection in self._all:
            for group in connection.groups:
                group.moved(connection, old, connection.phase)

    def sweep(self) -> None:
        """Ends the connections that have kept the server waiting too long."""
        now = asyncio.get_running_loop().time()
        for connection in list(self._all):
            connection.check(now)

    def abort(self) -> None:
        """Ends all connections at once."""
        for connection in list(self._all):
            connection.abort()


def _limit_kernel(connected: socket.socket | None) -> None:
    """Lets the kernel hold little of what the client has not asked for.

    By default it takes megabytes, minutes of speech, from a server whose client does not read.
    """
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if option is not None and connected is not None:
        with contextlib.suppress(OSError):  # such as a Unix socket
            connected.setsockopt(socket.IPPROTO_TCP, option, _KERNEL_BYTES)


class Protocol(typing.Protocol):
    """A protocol of uvicorn's, with what `transport.py` adds to it.

    Attributes:
      phase: what it is doing; of HTTP only.
      is_answered: whether the request has its whole response; of HTTP only.
      has_input: whether it has got input that it has not read, to read with `handle_events`.
    """

    phase: Phase
    is_answered: bool
    has_input: bool

    def handle_events(self) -> None: ...
    def connection_made(self, transport: "Connection") -> None: ...
    def connection_lost(self, error: Exception | None) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


def _num_queued(connected: Any) -> int:
    """Bytes that the kernel holds until the client has taken them; 0 where it does not say."""
    if connected is None:
        return 0
    try:
        answer = fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return struct.unpack("i", answer)[0]


class Pace:
    """How fast a client takes what is sent to it, counted only while something waits for it."""

    def __init__(self):
        self._taken = 0
        self._since: float | None = None

    def is_too_slow(self, now: float, taken: int, unsent: int, limits: Limits) -> bool:
        """Args: taken, unsent: bytes that the client has taken so far, and that wait for it."""
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
      phase, since: what it is doing, and since when.
      groups, share: of `Connections`, where it is counted.
    """

    def __init__(self, connections: Connections, make_protocol: Callable[[], Protocol]):
        self.phase = Phase.HEAD
        self.since = 0.0
        self.groups: list[Group] = []
        self.share: str | None = None
        self.connections = connections
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._accepted: socket.socket | None = None
        self._transport: asyncio.Transport | None = None
        self._inner: Protocol | None = None
        self._pieces: deque[bytes] = deque()
        self._is_scheduled = False
        self._wants_more = True
        self._is_reading = True
        self._can_write = True
        self._is_tls = False
        self._written = 0
        self._pace = Pace()

    # What the listener calls.

    def accept(self, accepted: socket.socket, host: str) -> bool:
        """Counts the connection; whether it may begin. The time for its first head runs from now.

        Args:
          accepted: its socket.
          host: address of the client.
        """
        self._accepted = accepted
        self.since = self._loop.time()
        return self.connections.admit(self, host)

    @property
    def refusal(self) -> bytes:
        """The response of a connection that may not begin."""
        error = ApiError(503, "too many connections", code="busy", retry_after=RETRY_AFTER)
        response = error.response
        headers = b"".join(b"%s: %s\r\n" % pair for pair in response.raw_headers)
        head = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n" + headers
        return head + b"\r\n" + response.body

    # What the event loop calls.

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
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
        pieces = (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
        self._pieces.extend(pieces)
        self._steer()

    def eof_received(self) -> None:
        if self._inner is not None:
            self._inner.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._pieces.clear()
        self.connections.remove(self)
        if self._inner is not None:
            self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        self._can_write = False
        if self._inner is not None:
            self._inner.pause_writing()
        self._steer()

    def resume_writing(self) -> None:
        self._can_write = True
        if self._inner is not None:
            self._inner.resume_writing()
        self._steer()

    # What uvicorn's protocols call.

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        """Ends the connection without sending what is not sent yet."""
        if self._transport is not None:
            self._transport.abort()
        elif self._accepted is not None:
            # The event loop owns the socket, and gives it up when the handshake fails.
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

        Under TLS the event loop has a second buffer, which is not told about. As long as there is
        something in it there is something in the kernel's queue, too.
        """
        unsent = self._transport.get_write_buffer_size()
        return unsent + _num_queued(self.get_extra_info("socket")) if self._is_tls else unsent

    def pause_reading(self) -> None:
        self._wants_more = False
        self._steer()

    def resume_reading(self) -> None:
        self._wants_more = True
        self._steer()

    def set_protocol(self, protocol: Protocol) -> None:
        """Takes another protocol: that of a WebSocket."""
        self._inner = protocol
        self._enter(Phase.SOCKET)

    def settle(self, is_answered: bool = False) -> None:
        """Notes what the connection is doing, after its protocol has done something.

        Args:
          is_answered: whether that was the end of a response.
        """
        if self.phase is Phase.SOCKET or self._inner is None:
            return
        phase = self._inner.phase
        # A head that has begun goes on; the time for it does not begin again.
        is_head = phase is Phase.IDLE and self.phase is Phase.HEAD
        if is_answered or (phase is not self.phase and not is_head):
            self._enter(phase)

    # Its own.

    def _enter(self, phase: Phase) -> None:
        old, self.phase, self.since = self.phase, phase, self._loop.time()
        self.connections.moved(self, old)

    def feed(self) -> None:
        """Hands on one piece. `InputScheduler` calls it."""
        self._is_scheduled = False
        if not self._may_feed:
            return
        try:
            if self._pieces:
                self._inner.data_received(self._pieces.popleft())
            else:
                self._inner.handle_events()
        except Exception:
            # What a protocol does not expect is no reason to go on with this client.
            self.abort()
        self.settle()
        self._steer()

    @property
    def _may_feed(self) -> bool:
        is_open = self._inner is not None and not self.is_closing()
        has_input = is_open and (bool(self._pieces) or self._inner.has_input)
        return has_input and self._wants_more and self._can_write

    def _steer(self) -> None:
        """Reads from the client only while there is little to do with what has come."""
        if self.is_closing():
            return
        # A client that does not read responses is not read from.
        should_read = self._wants_more and self._can_write and len(self._pieces) <= 1
        if should_read != self._is_reading:
            self._is_reading = should_read
            (self._transport.resume_reading if should_read else self._transport.pause_reading)()
        if self._may_feed and not self._is_scheduled:
            self._is_scheduled = True
            self.connections.input.add(self)

    def check(self, now: float) -> None:
        """Ends the connection if it has waited too long."""
        if self._transport is not None:
            self.settle()
            unsent = self.num_unsent
            taken = self._written - unsent
            if self._pace.is_too_slow(now, taken, unsent, self.connections.limits):
                self.abort()
                return
        if now - self.since > self._patience:
            self.abort()

    @property
    def _patience(self) -> float:
        """Seconds that the phase may last."""
        limits = self.connections.limits
        match self.phase:
            case Phase.HEAD:
                return limits.head_seconds
            case Phase.IDLE:
                return limits.idle_seconds
            case Phase.BODY if self._inner.is_answered:
                return _LINGER_SECONDS
            case Phase.BODY:
                longest = limits.body_bytes / limits.body_bytes_per_second
                return limits.body_seconds + longest + _GRACE_SECONDS
        return float("inf")
