"""The messages of a WebSocket: received while earlier ones are worked on, and bounded."""

import asyncio
import contextlib
from typing import Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from csm_jax.serve.admission.memory import Held
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits

# What an empty message counts for, in bytes.
MESSAGE_COST = 1000


class Talker(Protocol):
    """What works on the messages.

    Attributes:
      is_silent: whether nothing is spoken or waits to be.
    """

    is_silent: bool

    async def take(self, message: bytes | None) -> None:
        """Does what a message, in UTF-8, asks for; None is a binary one."""

    async def ended(self) -> None:
        """Returns when nothing can be sent any more."""


class Inbox:
    """Messages that have come and are not done, bounded by their bytes together."""

    def __init__(self, max_bytes: int, held: Held, share: str):
        """Starts empty.

        Args:
          held: counts the messages of all sockets, by share.
        """
        self._max_bytes = max_bytes
        self._held = held
        self._share = share
        self._num_held = 0
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()

    def __bool__(self) -> bool:
        return not self._messages.empty()

    def put(self, text: str | None) -> None:
        """Raises `ApiError` if too much waits already."""
        # Of a string, one rare character makes all others take four bytes.
        message = None if text is None else text.encode()
        cost = _cost(message)
        if self._num_held + cost > self._max_bytes:
            raise ApiError(429, "too many messages wait to be worked on", code="queue_full")
        self._held.check(self._share, cost)
        self._hold(cost)
        self._messages.put_nowait(message)

    async def get(self) -> bytes | None:
        """The next message, which is held until it is `done`."""
        return await self._messages.get()

    def done(self, message: bytes | None) -> None:
        """Says that a message is not needed any more."""
        self._hold(-_cost(message))

    def close(self) -> None:
        """Forgets all messages."""
        self._hold(-self._num_held)

    def _hold(self, cost: int) -> None:
        self._num_held += cost
        self._held.add(self._share, cost)


def _cost(message: bytes | None) -> int:
    return len(message or b"") + MESSAGE_COST


def held_messages(limits: Limits) -> Held:
    """The counter of the messages of several sockets."""
    return Held(limits.pending_body_bytes, "messages")


async def converse(
    socket: WebSocket,
    talker: Talker,
    limits: Limits,
    held: Held | None = None,
    share: str = "",
) -> None:
    """Takes the messages of a client until it leaves, says nothing for too long, or reads nothing.

    Messages are received while earlier ones are worked on, so that this ends with the client.

    Args:
      held: counts the messages of all sockets; by default of this one.
      share: whose messages they are.
    """
    inbox = Inbox(limits.body_bytes, held or held_messages(limits), share)
    tasks = [
        asyncio.create_task(_receive(socket, talker, inbox, limits.socket_idle_seconds)),
        asyncio.create_task(_take_all(talker, inbox)),
        asyncio.create_task(talker.ended()),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        inbox.close()
    for result in results:
        if isinstance(result, ApiError):
            raise result


async def _receive(socket: WebSocket, talker: Talker, inbox: Inbox, idle_seconds: float) -> None:
    """Raises `ApiError` for a client that has nothing to say, or too much."""
    receiving = asyncio.ensure_future(socket.receive())
    try:
        while True:
            done, _ = await asyncio.wait({receiving}, timeout=idle_seconds)
            if done:
                message = receiving.result()
                if message["type"] == "websocket.disconnect":
                    return
                inbox.put(message.get("text"))
                receiving = asyncio.ensure_future(socket.receive())
            elif talker.is_silent and not inbox:
                raise ApiError(408, f"no message for {idle_seconds:g} s", code="idle")
    finally:
        receiving.cancel()


async def _take_all(talker: Talker, inbox: Inbox) -> None:
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            message = await inbox.get()
            await talker.take(message)
            inbox.done(message)
