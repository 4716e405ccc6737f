"""Checks of the Host and Origin headers: which server a request is for, and which page sends it.

A page of another site can make a browser send requests here (with an Origin header that names the
site), or give its own name this server's address (DNS rebinding: the Host header has that name).
"""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from csm_jax.serve.errors import ApiError
from csm_jax.serve.network.addresses import parse_address

ANY = "*"
# A Host header: a name or an address, and optionally a port.
_HOST = re.compile(
    r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9._-]{1,253}))(?::([0-9]{1,5}))?", re.ASCII
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SOCKET_SCHEMES = {"ws": "http", "wss": "https"}
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class HostOriginMiddleware:
    """Refuses requests for other hosts, and requests from pages of other sites."""

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str], origins: Sequence[str]):
        """Wraps an application.

        Args:
          allowed_hosts: names of this server, besides localhost and IP addresses; "*" is any.
          origins: of pages that may send requests, besides those of the server itself.
        """
        self._app = app
        self._names = {"localhost", *(name.lower().rstrip(".") for name in allowed_hosts)}
        self._origins = {origin.lower() for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises `ApiError` for a request that must be refused."""
        if scope.get("http_version", "1.1") not in ("1.0", "1.1"):
            raise ApiError(505, "this server speaks HTTP/1.1", code="bad_version")
        if not scope["path"].startswith("/"):
            # Such as `GET http://other/path`, whose Host header would mean nothing.
            raise ApiError(400, "the target of a request has to begin with /", code="bad_target")
        headers = Headers(scope=scope)
        name, port = self._host(headers.getlist("host"))
        if scope["type"] == "websocket" or scope["method"] not in _SAFE_METHODS:
            sent: str = scope["scheme"]
            scheme = _SOCKET_SCHEMES.get(sent, sent)
            own = (scheme, name, port or _DEFAULT_PORTS.get(scheme))
            self._check_origin(headers, own)

    def _host(self, values: list[str]) -> tuple[str, int | None]:
        """The name and port of a Host header. Raises `ApiError` unless it is this server's."""
        found = _HOST.fullmatch(values[0]) if len(values) == 1 else None
        if not found:
            raise ApiError(400, "send one Host header, a name or address", code="bad_host")
        address, name, port = found.groups()
        host = (address or name).lower().rstrip(".")
        if ANY not in self._names and host not in self._names and parse_address(host) is None:
            message = f"this server is not {host[:100]}: start it with --allowed_hosts={host[:100]}"
            raise ApiError(421, message, code="bad_host")
        return host, int(port) if port else None

    def _check_origin(self, headers: Headers, own: tuple) -> None:
        origins = headers.getlist("origin")
        if ANY in self._origins:
            return
        if not origins:
            # Programs and old browsers send neither header.
            if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                raise _foreign("another site")
        elif len(origins) > 1 or not self._is_own(origins[0], own):
            raise _foreign(origins[0][:100])

    def _is_own(self, origin: str, own: tuple) -> bool:
        if origin.lower() in self._origins:
            return True
        scheme, _, host = origin.lower().partition("://")
        if not (found := _HOST.fullmatch(host)):
            return False  # such as "null", the origin of files and of pages in sandboxes
        address, name, port = found.groups()
        name = (address or name).rstrip(".")
        return (scheme, name, int(port) if port else _DEFAULT_PORTS.get(scheme)) == own


def _foreign(origin: str) -> ApiError:
    message = f"pages of {origin} may not send requests here: start with --cors_origins"
    return ApiError(403, message, code="foreign_origin")


def check_names(names: Sequence[str]) -> None:
    """Raises `ValueError` for a name that cannot be in a Host header."""
    for name in names:
        found = _HOST.fullmatch(name)
        if name != ANY and (not found or found[3] or found[1]):
            raise ValueError(f"{name[:100]!r} is no host name: write it without scheme and port")


def check_origins(origins: Sequence[str]) -> None:
    """Raises `ValueError` for an origin that cannot be in an Origin header."""
    for origin in origins:
        scheme, _, host = origin.partition("://")
        if origin != ANY and (scheme not in _DEFAULT_PORTS or not _HOST.fullmatch(host)):
            raise ValueError(
                f"{origin[:100]!r} is no origin: write https://NAME or https://NAME:PORT"
            )
