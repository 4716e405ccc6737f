"""Security headers of all responses."""

from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A browser must not treat speech, or an error that quotes a request, as a script or a page.
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# A page of another site must not embed responses of this server.
_RESOURCE_POLICY = "Cross-Origin-Resource-Policy"


class SecurityHeadersMiddleware:
    """Adds the headers to every HTTP response that does not have its own."""

    def __init__(self, app: ASGIApp, cors_origins: Sequence[str] = ()):
        """Wraps an application.

        Args:
          cors_origins: origins of pages that may embed the responses; "*" is any.
        """
        self._app = app
        self._is_open = "*" in cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if not self._is_open and "Access-Control-Allow-Origin" not in headers:
                    headers.setdefault(_RESOURCE_POLICY, "same-origin")
            await send(message)

        await self._app(scope, receive, send_with_headers)
