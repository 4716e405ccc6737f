"""The messages of a WebSocket: received while earlier ones are handled, and limited."""

import asyncio
import contextlib
from typing import Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from csm_jax.serve.admission.memory import MemoryBudget
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits

# Bytes for which an empty message counts.
MESSAGE_COST = 1000


class MessageHandler(Protocol):
    """Handles the messages of one WebSocket."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being generated or waits for that."""
        ...

    async def handle(self, message: bytes | None) -> None:
        """Handles a message in UTF-8; None is a binary one."""

    async def wait_until_ended(self) -> None:
        """Returns when nothing can be sent any more."""


class MessageQueue:
    """Messages that were received and are not handled yet, limited by their total size."""

    def __init__(self, max_bytes: int, budget: MemoryBudget, share: str):
        """Starts empty.

        Args:
          budget: counts the messages of all sockets, by share.
        """
        self._max_bytes = max_bytes
        self._budget = budget
        self._share = share
        self._num_bytes = 0
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()

    def __bool__(self) -> bool:
        return not self._messages.empty()

    def put(self, text: str | None) -> None:
        """Appends a message; None is a binary one. Raises `ApiError` if there is no room for it."""
        # In a `str` one rare character makes all others take four bytes.
        message = None if text is None else text.encode()
        cost = _cost(message)
        if self._num_bytes + cost > self._max_bytes:
            raise ApiError(429, "too many messages wait to be handled", code="queue_full")
        self._budget.check(self._share, cost)
        self._count(cost)
        self._messages.put_nowait(message)

    async def get(self) -> bytes | None:
        """Waits for the next message, which is counted until it is `done`."""
        return await self._messages.get()

    def done(self, message: bytes | None) -> None:
        """Takes a message out of the count, because it is not needed any more."""
        self._count(-_cost(message))

    def close(self) -> None:
        """Drops all messages."""
        self._count(-self._num_bytes)

    def _count(self, cost: int) -> None:
        self._num_bytes += cost
        self._budget.add(self._share, cost)


def _cost(message: bytes | None) -> int:
    return len(message or b"") + MESSAGE_COST


def message_budget(limits: Limits) -> MemoryBudget:
    """The memory budget for the messages of several sockets."""
    return MemoryBudget(limits.pending_body_bytes, "messages")


async def serve_messages(
    socket: WebSocket,
    handler: MessageHandler,
    limits: Limits,
    budget: MemoryBudget | None = None,
    share: str = "",
) -> None:
    """Handles the messages of a client until it disconnects, is idle too long, or reads nothing.

    Messages are received while earlier ones are handled, so that this ends with the client.

    Args:
      budget: counts the messages of all sockets; by default of this one.
      share: of the caller.

    Raises:
      ApiError: the client was idle for too long, or has sent too much.
    """
    queue = MessageQueue(limits.body_bytes, budget or message_budget(limits), share)
    tasks = [
        asyncio.create_task(_receive(socket, handler, queue, limits.socket_idle_seconds)),
        asyncio.create_task(_handle_all(handler, queue)),
        asyncio.create_task(handler.wait_until_ended()),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        queue.close()
    for result in results:
        if isinstance(result, ApiError):
            raise result


async def _receive(
    socket: WebSocket, handler: MessageHandler, queue: MessageQueue, idle_seconds: float
) -> None:
    """Receives messages. Raises `ApiError` for a client that is idle, or sends too much."""
    receiving = asyncio.ensure_future(socket.receive())
    try:
        while True:
            done, _ = await asyncio.wait({receiving}, timeout=idle_seconds)
            if done:
                message = receiving.result()
                if message["type"] == "websocket.disconnect":
                    return
                queue.put(message.get("text"))
                receiving = asyncio.ensure_future(socket.receive())
            elif handler.is_idle and not queue:
                raise ApiError(408, f"no message for {idle_seconds:g} s", code="idle")
    finally:
        receiving.cancel()


async def _handle_all(handler: MessageHandler, queue: MessageQueue) -> None:
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            message = await queue.get()
            await handler.handle(message)
            queue.done(message)
