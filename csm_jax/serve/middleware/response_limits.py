"""Responses in memory: sent in pieces that wait for the client, and counted until they are sent."""

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from csm_jax.serve.admission.caller import caller_of
from csm_jax.serve.admission.memory import Held
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits

# Bytes that the transport is given at once. What is smaller is in no count.
PIECE_BYTES = 32_768


class Responses:
    """Bounds what is held of responses that their clients have not taken.

    uvicorn buffers a body of any size that comes in one message, so it gets small ones. When too
    much is held, a response that has not begun becomes an error.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app = app
        self._held = Held(limits.pending_response_bytes, "responses", "sent")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        response = _Response(send, self._held, caller_of(HTTPConnection(scope)).share)
        try:
            await self._app(scope, receive, response.send)
        except _RefusedError as refused:
            await refused.error.response(scope, receive, send)


class _RefusedError(Exception):
    """There is no room for a response."""

    def __init__(self, error: ApiError):
        super().__init__(str(error))
        self.error = error


class _Response:
    """One response while it is sent. Its head waits for the first bytes of its body."""

    def __init__(self, send: Send, held: Held, share: str):
        self._send_on = send
        self._held = held
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
        self._held.add(self._share, len(body))
        try:
            await self._begin()
            await self._send_pieces(message, memoryview(body))
        finally:
            self._held.add(self._share, -len(body))

    def _check(self, num_bytes: int) -> None:
        try:
            self._held.check(self._share, num_bytes)
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
