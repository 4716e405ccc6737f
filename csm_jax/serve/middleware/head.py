"""HEAD: what GET would answer, without its body."""

from starlette.types import ASGIApp, Receive, Scope, Send


class Head:
    """Lets routes for GET answer HEAD. The server sends no body of a response to HEAD."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # A copy: the server's own scope goes on saying HEAD.
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)
