"""Limits of request bodies."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from csm_jax.serve.errors import ApiError


class BodyLimit:
    """Ends requests that are larger than they may be, while they come."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_bytes = 0
        has_started = False

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._limit:
                raise _TooLargeError
            return message

        async def send_noted(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        announced = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            # It may be a lie, or not be there.
            if announced.isdigit() and int(announced) > self._limit:
                raise _TooLargeError
            await self._app(scope, receive_counted, send_noted)
        except _TooLargeError:
            if not has_started:
                error = ApiError(413, f"the request has more than {self._limit} bytes")
                await error.response(scope, receive, send)


class _TooLargeError(BaseException):
    """Not an `Exception`: nobody between may answer it."""
