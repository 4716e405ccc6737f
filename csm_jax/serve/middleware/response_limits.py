"""Limits for responses in memory: they are sent in pieces, and counted until they are sent."""

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from csm_jax.serve.admission.caller import caller_of
from csm_jax.serve.admission.memory import MemoryBudget
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits

# Bytes that are written at once. Smaller responses are not counted.
PIECE_BYTES = 32_768


class ResponseLimitMiddleware:
    """Limits the memory of responses that their clients have not read.

    uvicorn buffers a body of any size that comes in one message, so large ones are sent in several.
    When there is no room, a response that has not begun is replaced by an error.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app = app
        self._budget = MemoryBudget(limits.pending_response_bytes, "responses", "sent")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response = _Response(send, self._budget, caller_of(HTTPConnection(scope)).share)
        try:
            await self._app(scope, receive, response.send)
        except _RefusedError as refused:
            await refused.error.response(scope["path"])(scope, receive, send)


class _RefusedError(Exception):
    """A response must not be sent, because there is no room for it."""

    def __init__(self, error: ApiError):
        super().__init__(str(error))
        self.error = error


class _Response:
    """A response that is being sent. Its head is delayed until the first bytes of its body."""

    def __init__(self, send: Send, budget: MemoryBudget, share: str):
        self._send_on = send
        self._budget = budget
        self._share = share
        self._head: Message | None = None

    async def send(self, message: Message) -> None:
        """Sends a message of the application. Raises `_RefusedError` if there is no room for it."""
        if message["type"] == "http.response.start":
            self._head = message
            return
        body = message.get("body", b"")
        if len(body) <= PIECE_BYTES:
            await self._begin()
            await self._send_on(message)
            return
        if self._head is not None:
            self._check(len(body))
        self._budget.add(self._share, len(body))
        try:
            await self._begin()
            await self._send_pieces(message, memoryview(body))
        finally:
            self._budget.add(self._share, -len(body))

    def _check(self, num_bytes: int) -> None:
        try:
            self._budget.check(self._share, num_bytes)
        except ApiError as error:
            raise _RefusedError(error) from error

    async def _begin(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            await self._send_on(head)

    async def _send_pieces(self, message: Message, body: memoryview) -> None:
        for start in range(0, len(body), PIECE_BYTES):
            piece = bytes(body[start : start + PIECE_BYTES])
            more = start + PIECE_BYTES < len(body) or message.get("more_body", False)
            await self._send_on({**message, "body": piece, "more_body": more})
