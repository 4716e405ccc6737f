"""Requests with the method HEAD."""

from starlette.types import ASGIApp, Receive, Scope, Send


class HeadMiddleware:
    """Hands HEAD requests to the routes for GET; uvicorn leaves out the body of the response.

    `/` redirects browsers to the page, but has an answer of its own for HEAD, which probes send.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD" and scope["path"] != "/":
            # A copy, because uvicorn needs the method in its own scope.
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
