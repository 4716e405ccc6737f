"""The HTTP server: uvicorn with the limits of `Connections`."""

import asyncio
import contextlib
import dataclasses
import logging
import resource
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from csm_jax.serve.admission.caller import caller_of
from csm_jax.serve.errors import TRY_AGAIN_LATER, ApiError
from csm_jax.serve.settings import Limits, Settings
from csm_jax.serve.transport.connection import Connection, Protocol
from csm_jax.serve.transport.connections import Connections, Phase
from csm_jax.serve.transport.listener import Listener

logger = logging.getLogger("csm_jax.serve")

# Connections that may wait to be accepted; the kernels of further clients try again.
BACKLOG = 256
# Open files besides connections: libraries, the store, outbound requests.
_SPARE_FILES = 512
# Bytes of a WebSocket message besides a recording and a text.
_MESSAGE_BYTES = 4096
# Frames of one message.
_MAX_FRAGMENTS = 1024
_PING_SECONDS = 20.0
# Fraction of the drain time for responses; unfinished jobs get some of the rest.
_RESPONSES_FRACTION = 0.7
# Code of a WebSocket close.
_TOO_BIG = 1009
# The response to a WebSocket's head that is too large: websockets reads 128 lines of 8 kB.
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)


class HttpProtocol(H11Protocol):
    """uvicorn's protocol for HTTP, which knows the phase of the connection.

    Attributes:
      has_input: whether another request has arrived behind one that has its response. It is read
        when it is the turn of this connection.
    """

    has_input = _is_ending = False

    @property
    def _connection(self) -> Connection:
        # `Connection` passes itself as the transport.
        return cast(Connection, self.transport)

    @property
    def phase(self) -> Phase:
        if self.is_answered and self._connection.num_unsent:
            return Phase.WRITING
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.BODY
        return Phase.IDLE if self.is_answered else Phase.BUSY

    @property
    def is_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        if {name for name, _ in self.headers} >= {b"content-length", b"transfer-encoding"}:
            # A proxy may treat what follows as a part of the body (RFC 9112, 6.3).
            self.transport.close()
        self._is_ending = True
        try:
            super().on_response_complete()
        finally:
            self._is_ending = False
        # uvicorn's timer would run while the response is being sent; that of `Connection` does not.
        self._unset_keepalive_if_required()
        self._connection.update_phase(is_answered=True)
        if self.has_input:
            self.transport.resume_reading()

    def handle_events(self) -> None:
        self.has_input = self._is_ending and bool(self.conn.trailing_data[0])
        if not self._is_ending:
            super().handle_events()

    def _should_upgrade(self) -> bool:
        # A WebSocket begins with a GET without a body; anything else is an ordinary request.
        names = {name for name, _ in self.headers}
        has_body = names & {b"content-length", b"transfer-encoding"}
        is_get = self.scope["method"] == "GET" and self.scope["http_version"] == "1.1"
        return is_get and not has_body and super()._should_upgrade()


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol for WebSockets, with limits for incomplete messages."""

    has_input = False
    _num_buffered, _share = 0, ""

    @property
    def _connection(self) -> Connection:
        # `Connection` passes itself as the transport.
        return cast(Connection, self.transport)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.handshake_initiated:
            # The data are a whole head, which `HttpProtocol` has accepted and websockets has not.
            self.transport.write(_REFUSAL)
            self.transport.close()
            return
        try:
            self._count_buffered(len(self.conn.reader.buffer) + sum(map(len, self.frames)))
        except ApiError:
            self._end(TRY_AGAIN_LATER)

    def handle_cont(self, event: Any) -> None:
        if len(self.frames) >= _MAX_FRAGMENTS:
            self._end(_TOO_BIG)
            return
        super().handle_cont(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._count_buffered(0)
        super().connection_lost(exc)

    def _count_buffered(self, num_bytes: int) -> None:
        """Counts the bytes of an incomplete message. Raises `ApiError` if there is no room."""
        messages, is_more = self._connection.connections.messages, num_bytes > self._num_buffered
        messages.add(self._share, -self._num_buffered)
        self._num_buffered = 0
        if num_bytes:
            # Known after the application has checked the key.
            self._share = caller_of(HTTPConnection(dict(self.scope))).share
            if is_more:
                messages.check(self._share, num_bytes)
            messages.add(self._share, num_bytes)
            self._num_buffered = num_bytes

    def _end(self, code: int) -> None:
        if not self.handshake_complete:
            self.transport.abort()
        elif not self.close_sent:
            self.conn.send_close(code)
            self.handle_parser_exception()


class Server(uvicorn.Server):
    """uvicorn's server, which checks all connections once a second."""

    def __init__(
        self, config: uvicorn.Config, connections: Connections, on_exit: Callable[[], None]
    ):
        """Does not listen yet.

        Args:
          on_exit: called when a signal stops the server.
        """
        super().__init__(config)
        self._connections = connections
        self._on_exit = on_exit

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self._on_exit()
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept connections at these sockets, after the application has started."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        listeners = [
            Listener(each, self._connections, self._make_connection, self.config.ssl)
            for each in sockets or ()
        ]
        # They have the methods of `asyncio.Server` that uvicorn calls.
        self.servers = cast(list[asyncio.Server], listeners)
        self.started = True

    def _make_connection(self) -> Connection:
        return Connection(self._connections, self._make_protocol)

    def _make_protocol(self) -> Protocol:
        protocol = HttpProtocol(self.config, self.server_state, self.lifespan.state)
        # Its transport is a `Connection`.
        return cast(Protocol, protocol)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._connections.sweep()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        sweeping = asyncio.create_task(self._sweep())
        try:
            await super().shutdown(sockets)
        finally:
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeping
            self._connections.abort()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._connections.sweep()


def make_server(
    app: ASGIApp,
    settings: Settings,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    on_exit: Callable[[], None] = lambda: None,
) -> Server:
    """Makes the server of an application; its `run` takes listening sockets.

    Args:
      on_exit: called when a signal stops it.
    """
    limits = raise_file_limit(settings.limits)
    connections = Connections(limits, settings.trusted_proxies)

    config = uvicorn.Config(
        app,
        http=HttpProtocol,
        ws=WebSocketProtocol,
        ws_max_size=_largest_message(limits),
        ws_ping_interval=_PING_SECONDS,
        ws_ping_timeout=_PING_SECONDS,
        # A compressed message could unpack to any size, and speech does not get smaller.
        ws_per_message_deflate=False,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        lifespan="on",
        log_config=None,
        # `RequestLogMiddleware` logs the requests.
        access_log=False,
        server_header=False,
        # `app.py` adds that middleware, for `Settings.trusted_proxies`.
        proxy_headers=False,
        # asyncio takes fractions of a second, too.
        timeout_graceful_shutdown=cast(int, _RESPONSES_FRACTION * settings.drain_seconds),
    )
    return Server(config, connections, on_exit)


def _largest_message(limits: Limits) -> int:
    """Bytes of a message with a recording in base64, and a text of escaped characters only."""
    return limits.audio_bytes * 4 // 3 + 6 * limits.text_characters + _MESSAGE_BYTES


def raise_file_limit(limits: Limits) -> Limits:
    """Raises the limit of open files to that of connections, or else lowers the latter."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.connections + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return limits
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return limits
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fewer = max(hard - _SPARE_FILES, hard // 2)
    message = "%d open files are allowed: at most %d connections (raise `ulimit -n` to %d)"
    logger.warning(message, hard, fewer, needed)
    return dataclasses.replace(limits, connections=fewer)
