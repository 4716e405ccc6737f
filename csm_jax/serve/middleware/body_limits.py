"""Request bodies: how large they may be, how fast they must come, how many are held at once."""

import asyncio

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from csm_jax.serve.admission.caller import caller_of
from csm_jax.serve.admission.memory import Held
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits

_SCOPE_KEY = "csm_jax.body"


def body_of(connection: HTTPConnection) -> "Body":
    """The body of a request, for its route to say what it expects."""
    return connection.scope[_SCOPE_KEY]


class Bodies:
    """Bounds what is read of request bodies, while it is read.

    A body is small, unless its route says by `Body.allow_recordings` that it can have recordings.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app = app
        self._limits = limits
        self._held = Held(limits.pending_body_bytes, "request bodies")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            announced = _announced(scope)
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        share = caller_of(HTTPConnection(scope)).share
        body = scope[_SCOPE_KEY] = Body(receive, announced, self._limits, self._held, share)

        async def send_noted(message: Message) -> None:
            # Whatever is needed of the body has been decoded by then.
            body.release()
            await send(message)

        try:
            await self._app(scope, body.receive, send_noted)
        finally:
            body.release()


def _announced(scope: Scope) -> int:
    """The length that the head says; 0 if it does not. Raises `ApiError`."""
    headers = [name for name, _ in scope["headers"]]
    if b"content-length" not in headers:
        return 0
    if b"transfer-encoding" in headers or headers.count(b"content-length") > 1:
        # Another server on the way may have read another length.
        raise ApiError(400, "send one Content-Length or a Transfer-Encoding, not both")
    value = dict(scope["headers"])[b"content-length"]
    if not value.isdigit():
        raise ApiError(400, "the Content-Length is no number")
    return int(value) if len(value) < 20 else 10**20


class Body:
    """The body of one request while it is read."""

    def __init__(self, receive: Receive, announced: int, limits: Limits, held: Held, share: str):
        self.limits = limits
        self._receive_more = receive
        self._announced = announced
        self._held = held
        self._share = share
        self._most = limits.json_bytes
        self._num_bytes = 0
        self._num_held = 0
        self._started: float | None = None
        self._is_complete = False
        self._is_released = False

    def allow_recordings(self) -> None:
        """Lets the body be as large as recordings can be. Called before any of it is read."""
        self._most = self.limits.body_bytes

    async def receive(self) -> Message:
        """The next message of the request, as in ASGI. Raises `ApiError`."""
        if self._is_complete:
            return await self._receive_more()
        if self._started is None:
            # Before "100 Continue" is sent, which the client may be waiting for.
            self._started = asyncio.get_running_loop().time()
            self._check(self._announced)
        message = await self._receive_in_time()
        if message["type"] == "http.request":
            self._add(len(message.get("body", b"")))
            self._is_complete = not message.get("more_body", False)
        return message

    async def _receive_in_time(self) -> Message:
        limits = self.limits
        seconds = limits.body_seconds + self._num_bytes / limits.body_bytes_per_second
        try:
            async with asyncio.timeout_at(self._started + seconds):
                return await self._receive_more()
        except TimeoutError as error:
            message = f"the body is not complete after {seconds:.0f} s: send it faster"
            raise ApiError(408, message, code="too_slow") from error

    def _check(self, num_bytes: int) -> None:
        if self._num_bytes + num_bytes > self._most:
            message = f"the request has more than {self._most} bytes"
            raise ApiError(413, message, code="too_large")
        self._held.check(self._share, num_bytes)

    def _add(self, num_bytes: int) -> None:
        if self._is_released:
            return
        self._check(num_bytes)
        self._num_bytes += num_bytes
        self._num_held += num_bytes
        self._held.add(self._share, num_bytes)

    def release(self) -> None:
        """Says that the body is not needed any more."""
        self._held.add(self._share, -self._num_held)
        self._num_held = 0
        self._is_released = True
