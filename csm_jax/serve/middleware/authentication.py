"""Authentication: which caller an API key belongs to, and which requests need no key."""

import base64
import binascii
import hashlib
import hmac
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from csm_jax.errors import InputError
from csm_jax.scheduler import MAX_WEIGHT
from csm_jax.serve.admission.caller import Caller, set_caller
from csm_jax.serve.admission.rate_limits import Quotas, Rates
from csm_jax.serve.api.page import PAGE
from csm_jax.serve.errors import ApiError
from csm_jax.serve.network.addresses import network_of

# Paths that need no key: probes and figures; the page, which is a client like any other; and files,
# whose names are random. They are compared with the decoded path that the router matches, and what
# is below a directory has plain names only: `/files/../v1/models` is not below `/files/`.
_OPEN = re.compile(
    rf"/|/docs|/healthz|/readyz|/metrics|{PAGE}|(?:{PAGE}|/files)/(?:[\w-][\w.-]*/)*(?:[\w-][\w.-]*)?",
    re.ASCII,
)
# Keys that may be refused within a minute from one address; the others are refused with 429.
REFUSALS_PER_MINUTE = 10
# Digits of a key's digest that name its owner.
_OWNER_DIGITS = 32
# Shorter than a digest, so that no tenant has the name of another key's owner.
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,30}")

# Subprotocols by which a browser, which cannot set the headers of a WebSocket, sends a key beside
# the one that it wants to speak.
_OWN_PROTOCOL, _OWN_KEY = "csm", "csm-key."
_OPENAI_PROTOCOL, _OPENAI_KEY = "realtime", "openai-insecure-api-key."


@dataclass(frozen=True)
class Key:
    """An API key, as its digest, and the caller that it belongs to."""

    digest: bytes
    caller: Caller


def parse_keys(lines: Sequence[str]) -> list[Key]:
    """The keys of lines `KEY [tenant=NAME] [weight=NUMBER]`.

    Keys of one tenant have one owner and one share.

    Raises:
      InputError: a line cannot be understood. The message does not contain the key.
    """
    keys: list[Key] = []
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        key = _parse_key(line, f"API key {number}")
        if any(key.digest == other.digest for other in keys):
            raise InputError(f"API key {number} is given twice: remove one of them")
        caller = key.caller
        if weights.setdefault(caller.owner, caller.weight) != caller.weight:
            raise InputError(f"tenant {caller.owner} has two weights: give all its keys the same")
        keys.append(key)
    return keys


def _parse_key(line: str, what: str) -> Key:
    key, *options = line.split(" ")
    options = [option for option in options if option]
    if not key or not line.isascii() or not line.isprintable() or "," in key:
        raise InputError(f"{what} has to be printable ASCII characters without spaces and commas")
    if key.startswith(("tenant=", "weight=")):
        raise InputError(f"{what} is missing before its options: write KEY tenant=NAME")
    values: dict[str, str] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in ("tenant", "weight") or name in values or not value:
            raise InputError(f"{what} has an option that is not tenant=NAME or weight=NUMBER")
        values[name] = value
    digest = _digest(key)
    owner = _tenant(values["tenant"], what) if "tenant" in values else _owner(digest)
    return Key(digest, Caller(owner, owner, _weight(values.get("weight", "1"), what)))


def _tenant(name: str, what: str) -> str:
    if not _TENANT.fullmatch(name):
        rule = "up to 31 of a-z, 0-9, _ and -, beginning with a letter or digit"
        raise InputError(f"{what} has the tenant {name[:40]!r}, but a name is {rule}")
    return name


def _weight(text: str, what: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT:
        rule = f"a number from {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
        raise InputError(f"{what} has the weight {text[:40]!r}, but a weight is {rule}")
    return weight


def read_keys(text: str) -> list[str]:
    """The lines of a keys file that have a key: empty lines and comments are left out."""
    lines = (line.strip() for line in text.removeprefix("\ufeff").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class Keys:
    """Authenticates requests, and refuses those that need a key and have none that is known.

    Every key that is sent is compared, however many were wrong before, so that a client with the
    right key is served even when others behind its address guess. What protects a key from being
    guessed is its length; what is limited are the wrong ones, which get 429 instead of 401.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[Key], quotas: Quotas):
        """Wraps an application.

        Args:
          keys: without any, no request needs one, and shares are those of addresses.
        """
        self._app = app
        self._keys = keys
        self._quotas = quotas
        self._refusals = Rates(REFUSALS_PER_MINUTE, "wrong API keys")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        try:
            set_caller(connection, self._admit(connection))
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        if scope["type"] == "websocket":
            send = _with_protocol(scope, send)
        await self._app(scope, receive, send)

    def _admit(self, connection: HTTPConnection) -> Caller:
        """The caller, whose request is counted. Raises `ApiError`."""
        if is_open(connection.scope["path"]):
            return Caller("", address_share(connection))
        caller = self._find(connection)
        self._quotas.count(caller)
        return caller

    def _find(self, connection: HTTPConnection) -> Caller:
        """The caller of a request. Raises `ApiError` if its key is missing or wrong."""
        share = address_share(connection)
        if not self._keys:
            return Caller("", share)
        if (given := _given_key(connection)) is not None:
            if key := find_key(given, self._keys):
                return key.caller
            self._refusals.count(share)
        raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="bad_key")


def find_key(given: str, keys: Sequence[Key]) -> Key | None:
    """The key that was given, if it is one of these."""
    digest = _digest(given)
    # All are compared, so that the time does not tell which one is similar.
    found = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    return found[0] if found else None


def is_open(path: str) -> bool:
    """Whether a path, as the router sees it, needs no key."""
    return _OPEN.fullmatch(path) is not None


def address_share(connection: HTTPConnection) -> str:
    """The share of a client without a key: its address, or the /64 of an IPv6 address."""
    return network_of(connection.client.host if connection.client else "")


def _given_key(connection: HTTPConnection) -> str | None:
    """As OpenAI's and DeepInfra's clients (Bearer) and fal's (Key) send it, or as `x-api-key`.

    A page in a browser cannot set headers of a WebSocket: there a subprotocol or `?api_key=` does.
    """
    headers = connection.headers
    sent = [_authorization(value) for value in headers.getlist("authorization")]
    sent = [value for value in sent if value is not None] + headers.getlist("x-api-key")
    if not sent and connection.scope["type"] == "websocket":
        return _socket_key(connection)
    # Of several it is not clear which one was meant.
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
    """The key in base64url without padding; "" if it is none."""
    try:
        # The alphabet of base64url, strictly: other characters would be skipped.
        standard = text.rstrip("=").translate(str.maketrans("-_", "+/"))
        return base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""


def _with_protocol(scope: Scope, send: Send) -> Send:
    """Selects the subprotocol that the client offered beside its key."""
    offered = scope.get("subprotocols", ())
    chosen = next((each for each in (_OWN_PROTOCOL, _OPENAI_PROTOCOL) if each in offered), None)

    async def send_chosen(message: Message) -> None:
        if message["type"] == "websocket.accept" and chosen and not message.get("subprotocol"):
            message = {**message, "subprotocol": chosen}
        await send(message)

    return send_chosen


def _owner(digest: bytes) -> str:
    return digest.hex()[:_OWNER_DIGITS]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
