"""Limits for request bodies: their size, their transfer time, and their memory altogether."""

import asyncio

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from csm_jax.serve.admission.caller import caller_of
from csm_jax.serve.admission.memory import MemoryBudget
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits

_SCOPE_KEY = "csm_jax.body"


def body_of(connection: HTTPConnection) -> "Body":
    """The body of a request, by which a route can raise its size limit."""
    return connection.scope[_SCOPE_KEY]


class BodyLimitMiddleware:
    """Limits request bodies while they are read.

    The size limit is small, unless the route calls `Body.allow_recordings`.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app = app
        self._limits = limits
        self._budget = MemoryBudget(limits.pending_body_bytes, "request bodies")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            content_length = _content_length(scope)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        share = caller_of(HTTPConnection(scope)).share
        body = scope[_SCOPE_KEY] = Body(receive, content_length, self._limits, self._budget, share)

        async def send_and_release(message: Message) -> None:
            # A response begins after the body has been decoded.
            body.release()
            await send(message)

        try:
            await self._app(scope, body.receive, send_and_release)
        finally:
            body.release()


def _content_length(scope: Scope) -> int:
    """The value of Content-Length; 0 without that header. Raises `ApiError`."""
    headers = [name for name, _ in scope["headers"]]
    if b"content-length" not in headers:
        return 0
    if b"transfer-encoding" in headers or headers.count(b"content-length") > 1:
        # A proxy may have used the other length.
        raise ApiError(400, "send one Content-Length or a Transfer-Encoding, not both")
    value = dict(scope["headers"])[b"content-length"]
    if not value.isdigit():
        raise ApiError(400, "the Content-Length is no number")
    return int(value) if len(value) < 20 else 10**20


class Body:
    """The body of one request while it is read."""

    def __init__(
        self,
        receive: Receive,
        content_length: int,
        limits: Limits,
        budget: MemoryBudget,
        share: str,
    ):
        self.limits = limits
        self._receive_more = receive
        self._content_length = content_length
        self._budget = budget
        self._share = share
        self._most = limits.json_bytes
        self._num_bytes = 0
        self._num_counted = 0
        self._started: float | None = None
        self._is_complete = False
        self._is_released = False

    def allow_recordings(self) -> None:
        """Raises the size limit to that of recordings. To be called before the body is read."""
        self._most = self.limits.body_bytes

    async def receive(self) -> Message:
        """The next message of the request, as in ASGI. Raises `ApiError`."""
        if self._is_complete:
            return await self._receive_more()
        if self._started is None:
            # Checked before "100 Continue" is sent, for which the client may be waiting.
            self._started = asyncio.get_running_loop().time()
            self._check(self._content_length)
        message = await self._receive_in_time(self._started)
        if message["type"] == "http.request":
            self._add(len(message.get("body", b"")))
            self._is_complete = not message.get("more_body", False)
        return message

    async def _receive_in_time(self, started: float) -> Message:
        limits = self.limits
        seconds = limits.body_seconds + self._num_bytes / limits.body_bytes_per_second
        try:
            async with asyncio.timeout_at(started + seconds):
                return await self._receive_more()
        except TimeoutError as error:
            message = f"the body is not complete after {seconds:.0f} s: send it faster"
            raise ApiError(408, message, code="too_slow") from error

    def _check(self, num_bytes: int) -> None:
        if self._num_bytes + num_bytes > self._most:
            message = f"the request has more than {self._most} bytes"
            raise ApiError(413, message, code="too_large")
        self._budget.check(self._share, num_bytes)

    def _add(self, num_bytes: int) -> None:
        if self._is_released:
            return
        self._check(num_bytes)
        self._num_bytes += num_bytes
        self._num_counted += num_bytes
        self._budget.add(self._share, num_bytes)

    def release(self) -> None:
        """Takes the body out of the memory budget, because it is not needed any more."""
        self._budget.add(self._share, -self._num_counted)
        self._num_counted = 0
        self._is_released = True
