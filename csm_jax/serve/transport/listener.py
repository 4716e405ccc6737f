"""Accepts connections, and counts each before the server does anything else for it.

The servers of the event loops call the protocol of a TLS connection only after the handshake, so a
client that never begins one would not be counted.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable

from csm_jax.serve.transport.connection import Connection
from csm_jax.serve.transport.connections import Connections

logger = logging.getLogger("csm_jax.serve")

# Connections that are accepted in one round of the event loop, so that a flood does not block it.
_MAX_ACCEPTED = 32
# Seconds without accepting after the process ran out of file descriptors.
_PAUSE = 0.5
# How long a refused connection stays open for its request to arrive, and how many may do so.
_REFUSED_SECONDS, _MOST_REFUSED = 0.2, 64
_READ_BYTES = 65_536


class Listener:
    """A listening socket, with the methods of `asyncio.Server` that uvicorn calls."""

    def __init__(
        self,
        listening: socket.socket,
        connections: Connections,
        make_connection: Callable[[], Connection],
        context: ssl.SSLContext | None = None,
    ):
        """Begins to accept connections.

        Args:
          context: for TLS; None for plain connections.
        """
        self._listening = listening
        self._connections = connections
        self._make_connection = make_connection
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task] = set()
        self._refused: set[socket.socket] = set()
        self._is_closed = False
        listening.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accepts no more connections; those that were accepted continue."""
        self._is_closed = True
        self._loop.remove_reader(self._listening.fileno())

    async def wait_closed(self) -> None:
        """Returns at once, because nothing remains after `close`."""

    def _resume(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listening.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_MAX_ACCEPTED):
            try:
                accepted, address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("no connection can be accepted for %g s: %s", _PAUSE, error)
                self._loop.remove_reader(self._listening.fileno())
                self._loop.call_later(_PAUSE, self._resume)
                return
            accepted.setblocking(False)
            self._begin(accepted, str(address[0]) if address else "")

    def _begin(self, accepted: socket.socket, host: str) -> None:
        connection = self._make_connection()
        if not connection.accept(accepted, host):
            self._refuse(accepted, connection.refusal)
            return
        task = self._loop.create_task(self._connect(accepted, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refuse(self, accepted: socket.socket, response: bytes) -> None:
        # A client could not read the response before the TLS handshake.
        if self._context is not None or len(self._refused) >= _MOST_REFUSED:
            accepted.close()
            return
        with contextlib.suppress(OSError):
            accepted.send(response)
            accepted.shutdown(socket.SHUT_WR)
        # Bytes that arrive at a closed socket would make the client's kernel drop the response.
        self._refused.add(accepted)
        self._loop.call_later(_REFUSED_SECONDS, self._drop, accepted)

    def _drop(self, refused: socket.socket) -> None:
        self._refused.discard(refused)
        with contextlib.suppress(OSError):
            refused.recv(_READ_BYTES)
        refused.close()

    async def _connect(self, accepted: socket.socket, connection: Connection) -> None:
        limits, is_tls = self._connections.limits, self._context is not None
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=limits.head_seconds if is_tls else None,
                # Bytes that are unsent when a connection is closed must still be sent.
                ssl_shutdown_timeout=limits.write_seconds * 10 if is_tls else None,
            )
        except (OSError, asyncio.CancelledError):
            # The handshake failed, or the connection made room for another.
            accepted.close()
            self._connections.remove(connection)
        except Exception:
            accepted.close()
            self._connections.remove(connection)
            logger.exception("a connection could not begin")
