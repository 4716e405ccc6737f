"""Requests with the method HEAD."""

from starlette.types import ASGIApp, Receive, Scope, Send


class HeadMiddleware:
    """Hands HEAD requests to the routes for GET; uvicorn leaves out the body of the response."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # A copy, because uvicorn needs the method in its own scope.
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
