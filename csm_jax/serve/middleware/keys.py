"""Authentication by API keys, and rates of each caller."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from csm_jax.serve.errors import ApiError
from csm_jax.serve.quotas import Rates

PAGE = "/page"
# What needs no key: probes and figures; the page, which asks for one itself; and files, whose names
# nobody knows who was not told.
OPEN_PATHS = ("/healthz", "/readyz", "/metrics", "/", PAGE)
OPEN_DIRECTORIES = (f"{PAGE}/", "/files/")
# Recordings for the page, of everybody together: they lie on the disk for ten minutes.
_UPLOADS = f"{PAGE}/gradio_api/upload"
_UPLOADS_PER_MINUTE = 30


class Keys:
    """Lets those in who have a key, as often as they may."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], requests_per_minute: int):
        self._app = app
        self._keys = keys
        self._rates = Rates(requests_per_minute)
        self._uploads = Rates(_UPLOADS_PER_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(HTTPConnection(scope))
        except ApiError as error:
            if scope["type"] == "websocket":
                await WebSocketClose(1008, str(error))(scope, receive, send)
            else:
                await error.response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, connection: HTTPConnection) -> None:
        """Raises `ApiError` for who has no key, or asks too often."""
        path = connection.scope["path"]
        if not _is_open(path):
            self._rates.count(self._caller(connection))
        elif path.startswith(f"{PAGE}/") and connection.scope.get("method") == "POST":
            # The page asks for a key itself, but does not count.
            self._rates.count(_address(connection))
            if path.startswith(_UPLOADS):
                self._uploads.count("")

    def _caller(self, connection: HTTPConnection) -> str:
        """The key, or the address where there are no keys."""
        if not self._keys:
            return _address(connection)
        given = _key(connection)
        if not is_key(given, self._keys):
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="bad_key")
        return _digest(given).hex()


def _address(connection: HTTPConnection) -> str:
    return connection.client.host if connection.client else ""


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_DIRECTORIES)


def _key(connection: HTTPConnection) -> str:
    """As OpenAI's and DeepInfra's clients (Bearer) and fal's (Key) send it, or as `x-api-key`.

    A page in a browser cannot set headers of a WebSocket: there `?api_key=` does.
    """
    kind, _, value = connection.headers.get("authorization", "").partition(" ")
    if kind.lower() in ("bearer", "key"):
        return value.strip()
    if connection.scope["type"] == "websocket" and "api_key" in connection.query_params:
        return connection.query_params["api_key"]
    return connection.headers.get("x-api-key", "")


def is_key(given: str, keys: Sequence[str]) -> bool:
    """Whether it is one of the keys, found out in the same time for all that are given."""
    digest = _digest(given)
    return bool(sum(hmac.compare_digest(digest, _digest(key)) for key in keys))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
