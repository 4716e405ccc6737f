"""Authentication: identifies the caller of each request by its API key or address."""

import base64
import binascii
import re
from collections.abc import Sequence

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from csm_jax.serve.admission.api_keys import ApiKey, find_key
from csm_jax.serve.admission.caller import Caller, set_caller
from csm_jax.serve.admission.rate_limits import RateLimits, TokenBuckets
from csm_jax.serve.errors import ApiError
from csm_jax.serve.network.addresses import network_of
from csm_jax.serve.settings import PAGE_PATH

# Paths that need no key: probes and metrics; the page, which is a client like any other; and
# downloads, whose names are random. They are compared with the decoded path that the router
# matches, and names below a directory are plain: `/files/../v1/models` is not below `/files/`.
_OPEN = re.compile(
    rf"/|/docs|/healthz|/readyz|/metrics|{PAGE_PATH}|(?:{PAGE_PATH}|/files)/(?:[\w-][\w.-]*/)*(?:[\w-][\w.-]*)?",
    re.ASCII,
)
# What clients list without sending a key (Open WebUI): the names of models and shared voices.
_LISTS = frozenset({"/v1/audio/voices", "/v1/audio/models"})
# Headers that are a key and nothing else; the second is ElevenLabs'.
_KEY_HEADERS = ("x-api-key", "xi-api-key")
# Wrong keys from one address that get 401 within a minute; further ones get 429.
REFUSALS_PER_MINUTE = 10
# A browser cannot set the headers of a WebSocket, so it sends a key as a subprotocol, beside the
# one that it wants to use.
_OWN_PROTOCOL, _OWN_KEY = "csm", "csm-key."
_OPENAI_PROTOCOL, _OPENAI_KEY = "realtime", "openai-insecure-api-key."


class AuthenticationMiddleware:
    """Authenticates requests, and refuses those that need a key but have no valid one.

    Every key is compared, however many wrong ones came before it, so that a client with a valid key
    is served even when others behind its address guess keys. The length of a key protects it
    from being guessed; the limit applies to wrong keys only, which get 429 instead of 401.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey], rate_limits: RateLimits):
        """Wraps an application.

        Args:
          keys: without any, no request needs one, and each address has its own share.
          rate_limits: count the requests.
        """
        self._app = app
        self._keys = keys
        self._rate_limits = rate_limits
        self._refusals = TokenBuckets(REFUSALS_PER_MINUTE, "wrong API keys")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        try:
            set_caller(connection, self._admit(connection))
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        if scope["type"] == "websocket":
            send = _with_protocol(scope, send)
        await self._app(scope, receive, send)

    def _admit(self, connection: HTTPConnection) -> Caller:
        """Finds the caller, and counts its request. Raises `ApiError`."""
        if is_open(connection.scope["path"]):
            return Caller("", address_share(connection))
        caller = self._find(connection)
        self._rate_limits.count(caller)
        return caller

    def _find(self, connection: HTTPConnection) -> Caller:
        """The caller of a request. Raises `ApiError` if its key is missing or wrong."""
        share = address_share(connection)
        if not self._keys:
            return Caller("", share)
        if (given := _key_of(connection)) is not None:
            if key := find_key(given, self._keys):
                return key.caller
            self._refusals.count(share)
        elif _is_list(connection) and not _has_key(connection):
            return Caller.without_key(share)
        raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="bad_key")


def is_open(path: str) -> bool:
    """Whether a path, as the router matches it, needs no key."""
    return _OPEN.fullmatch(path) is not None


def _is_list(connection: HTTPConnection) -> bool:
    scope = connection.scope
    return scope["path"] in _LISTS and scope.get("method") == "GET"


def _has_key(connection: HTTPConnection) -> bool:
    """Whether a request has anything in the place of a key, valid or not."""
    return any(name in connection.headers for name in ("authorization", *_KEY_HEADERS))


def address_share(connection: HTTPConnection) -> str:
    """The share of a client without a key: its address, or the /64 of an IPv6 address."""
    return network_of(connection.client.host if connection.client else "")


def _key_of(connection: HTTPConnection) -> str | None:
    """The key of a request; None if there is none, or several.

    OpenAI's and DeepInfra's clients send `Authorization: Bearer`, fal's `Authorization: Key`,
    ElevenLabs' `xi-api-key`, others `x-api-key`. A WebSocket can have it in a subprotocol or in
    `?api_key=` instead.
    """
    headers = connection.headers
    sent = [_authorization(value) for value in headers.getlist("authorization")]
    sent = [value for value in sent if value is not None]
    sent += [value for name in _KEY_HEADERS for value in headers.getlist(name)]
    if not sent and connection.scope["type"] == "websocket":
        return _socket_key(connection)
    # Of several keys it is not clear which one is meant.
    return sent[0] if len(sent) == 1 else None


def _authorization(value: str) -> str | None:
    kind, _, key = value.partition(" ")
    return key.strip() if kind.lower() in ("bearer", "key") else None


def _socket_key(connection: HTTPConnection) -> str | None:
    for protocol in connection.scope.get("subprotocols", ()):
        if protocol.startswith(_OPENAI_KEY):
            return protocol.removeprefix(_OPENAI_KEY)
        if protocol.startswith(_OWN_KEY):
            return _decode(protocol.removeprefix(_OWN_KEY))
    return connection.query_params.get("api_key")


def _decode(text: str) -> str:
    """The key in base64url without padding; "" if it cannot be decoded."""
    try:
        # By default characters outside of the alphabet of base64url would be skipped.
        standard = text.rstrip("=").translate(str.maketrans("-_", "+/"))
        return base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""


def _with_protocol(scope: Scope, send: Send) -> Send:
    """A `send` that accepts the subprotocol which the client offered beside its key."""
    offered = scope.get("subprotocols", ())
    chosen = next((each for each in (_OWN_PROTOCOL, _OPENAI_PROTOCOL) if each in offered), None)

    async def send_chosen(message: Message) -> None:
        if message["type"] == "websocket.accept" and chosen and not message.get("subprotocol"):
            message = {**message, "subprotocol": chosen}
        await send(message)

    return send_chosen
