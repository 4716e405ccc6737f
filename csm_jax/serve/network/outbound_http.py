"""Connections that a request asks the server to make: to public addresses only.

A host is resolved once, every address that it has must be public, and the address that was checked
is the one that is dialled. A redirect is a connection like any other.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterable
from contextvars import ContextVar
from typing import Any, NoReturn
from urllib.parse import urljoin, urlsplit
from weakref import WeakValueDictionary

import httpcore

from csm_jax.errors import InputError, first_line
from csm_jax.serve.admission.caller import INTERNAL, Caller
from csm_jax.serve.admission.thread_pools import FairPool
from csm_jax.serve.network.addresses import parse_address
from csm_jax.serve.network.special_addresses import is_public

MAX_REDIRECTS = 3
# Until the receiver of a webhook has answered.
POST_SECONDS = 20.0
# Connections at once: for all fetches, for those of one share, and for all webhooks.
_MAX_FETCHES, _FETCHES_OF_SHARE, _MAX_POSTS = 64, 4, 64
# Threads that resolve names. A name server of a client's choice can take half a minute for each.
_NAME_THREADS = 8
# For whom a connection is opened, which httpcore does not hand on.
_caller: ContextVar[Caller] = ContextVar("caller", default=INTERNAL)
_REDIRECTS = (301, 302, 303, 307, 308)
_TIMEOUTS = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), 10.0)}


class Outgoing:
    """An HTTP client for addresses that clients choose."""

    def __init__(self, allow_private: bool):
        """Opens a pool of connections.

        Args:
          allow_private: also dial addresses of private networks and of this machine.
        """
        # Made once: reading the certificates of all authorities takes a tenth of a second.
        context = httpcore.default_ssl_context()
        self._names = FairPool(_NAME_THREADS, "csm_jax.serve.names")

        def open_pool(max_connections: int) -> httpcore.AsyncConnectionPool:
            return httpcore.AsyncConnectionPool(
                ssl_context=context,
                network_backend=_Checked(allow_private, self._names),
                max_connections=max_connections,
                max_keepalive_connections=0,
            )

        self._fetches = open_pool(_MAX_FETCHES)
        self._posts = open_pool(_MAX_POSTS)
        self._post_turns = asyncio.Semaphore(_MAX_POSTS)
        self._fetch_turns = WeakValueDictionary[str, asyncio.Semaphore]()

    async def close(self) -> None:
        await self._fetches.aclose()
        await self._posts.aclose()
        self._names.close()

    async def fetch(self, url: str, max_bytes: int, seconds: float, share: str = "") -> bytes:
        """What lies at an address.

        Args:
          share: whose fetches are counted together: they wait for one another beyond a few.

        Raises:
          InputError: it cannot be fetched, or is beyond a limit.
        """
        _caller.set(Caller(share=share))
        turn = self._fetch_turns.setdefault(share, asyncio.Semaphore(_FETCHES_OF_SHARE))
        try:
            async with asyncio.timeout(seconds), turn:
                for _ in range(MAX_REDIRECTS + 1):
                    data, url = await self._get(url, max_bytes)
                    if data is not None:
                        return data
            raise InputError(f"{url[:200]}: more than {MAX_REDIRECTS} redirects")
        except TimeoutError as error:
            raise InputError(f"{url[:200]}: took more than {seconds:g} s") from error
        except _FAILURES as error:
            raise InputError(f"{url[:200]}: cannot be fetched ({first_line(error)})") from error

    async def post(self, url: str, body: bytes, headers: dict[str, str], share: str = "") -> int:
        """Posts JSON, and returns the status; what else is answered is not read.

        Redirects are not followed. Raises `InputError`.

        Args:
          share: whose posts they are: their names are resolved in turn with those of others.
        """
        check_url(url)
        _caller.set(Caller(share=share))
        headers = {"Content-Type": "application/json", **headers}
        arguments = {"headers": headers, "content": body, "extensions": _TIMEOUTS}
        try:
            # The time runs from when there is a connection for it.
            async with (
                self._post_turns,
                asyncio.timeout(POST_SECONDS),
                self._posts.stream("POST", url, **arguments) as answer,
            ):
                return answer.status
        except TimeoutError as error:
            raise InputError(f"{url[:200]}: took more than {POST_SECONDS:g} s") from error
        except _FAILURES as error:
            raise InputError(f"{url[:200]}: cannot be reached ({first_line(error)})") from error

    async def _get(self, url: str, max_bytes: int) -> tuple[bytes | None, str]:
        """The bytes, or None and where they are instead."""
        check_url(url)
        async with self._open(url) as answer:
            headers = {name.lower(): value for name, value in answer.headers}
            if answer.status in _REDIRECTS and b"location" in headers:
                return None, urljoin(url, headers[b"location"].decode("latin-1"))
            if answer.status != 200:
                raise InputError(f"{url[:200]}: answered with status {answer.status}")
            data = bytearray()
            async for piece in answer.aiter_stream():
                data += piece
                if len(data) > max_bytes:
                    raise InputError(f"{url[:200]}: more than {max_bytes} bytes")
        return bytes(data), url

    @contextlib.asynccontextmanager
    async def _open(self, url: str) -> AsyncIterator[httpcore.Response]:
        # Compressed answers would unpack to any size.
        headers = {"Accept-Encoding": "identity", "User-Agent": "csm-jax"}
        async with self._fetches.stream(
            "GET", url, headers=headers, extensions=_TIMEOUTS
        ) as answer:
            yield answer


_FAILURES = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
    OSError,
    UnicodeError,
)


def check_url(url: str) -> None:
    """Raises `InputError` for what is no http(s) address, or has a name and password in it."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_good = False
    is_plain = url.isascii() and url.isprintable() and len(url) <= 2048
    if not is_good or "@" in parts.netloc or not is_plain:
        raise InputError(f"{url[:200]!r} is no http or https address that can be used")


async def public_address(names: FairPool, host: str, port: int, allow_private: bool) -> str:
    """The address to dial. Raises `InputError` unless every address of the host is public.

    Args:
      names: resolves them, in turn with those of other callers: not in the threads that the event
        loop has for everything, which slow name servers would take.
    """
    kind = socket.SOCK_STREAM
    found = await names.run(_caller.get(), socket.getaddrinfo, host, port, socket.AF_UNSPEC, kind)
    addresses = [entry[4][0] for entry in found]
    if not allow_private:
        _check_public(host, addresses)
    return addresses[0]


def _check_public(host: str, addresses: Iterable[str]) -> None:
    for text in addresses:
        address = parse_address(text)
        if address is None or not is_public(address):
            raise InputError(f"{host} is not a public address")


class _Checked(httpcore.AsyncNetworkBackend):
    """Dials what `public_address` allows."""

    def __init__(self, allow_private: bool, names: FairPool):
        self._allow_private = allow_private
        self._names = names
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, *args: Any, **kwargs: Any
    ) -> httpcore.AsyncNetworkStream:
        address = await public_address(self._names, host, port, self._allow_private)
        return await self._inner.connect_tcp(address, port, *args, **kwargs)

    async def connect_unix_socket(self, *_: Any, **__: Any) -> NoReturn:
        raise httpcore.UnsupportedProtocol("sockets of this machine are not dialled")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)
