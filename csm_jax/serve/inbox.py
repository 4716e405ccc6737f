"""The messages of a WebSocket: received while earlier ones are worked on, and bounded."""

import asyncio
import contextlib
from typing import Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits

# What an empty message counts for, in characters.
MESSAGE_COST = 1000


class Talker(Protocol):
    """What works on the messages.

    Attributes:
      is_silent: whether nothing is spoken or waits to be.
    """

    is_silent: bool

    async def take(self, message: str | None) -> None:
        """Does what a message asks for; None is a binary one."""

    async def ended(self) -> None:
        """Returns when nothing can be sent any more."""


class Inbox:
    """Messages that have come and wait to be worked on, bounded by their length together."""

    def __init__(self, max_characters: int):
        self._left = max_characters
        self._messages: asyncio.Queue[str | None] = asyncio.Queue()

    def __bool__(self) -> bool:
        return not self._messages.empty()

    def put(self, message: str | None) -> None:
        """Raises `ApiError` if too much waits already."""
        self._left -= len(message or "") + MESSAGE_COST
        if self._left < 0:
            raise ApiError(429, "too many messages wait to be worked on", code="queue_full")
        self._messages.put_nowait(message)

    async def get(self) -> str | None:
        message = await self._messages.get()
        self._left += len(message or "") + MESSAGE_COST
        return message


async def converse(socket: WebSocket, talker: Talker, limits: Limits) -> None:
    """Takes the messages of a client until it leaves, says nothing for too long, or reads nothing.

    Messages are received while earlier ones are worked on, so that this ends with the client.
    """
    inbox = Inbox(limits.body_bytes)
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
            await talker.take(await inbox.get())
