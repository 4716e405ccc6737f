"""HTTP requests to URLs that clients choose: to public addresses only.

A host is resolved once, all its addresses must be public, and the connection is made to an address
that was checked. The same holds for redirects.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterable
from contextvars import ContextVar
from typing import Any, NoReturn, cast
from urllib.parse import urljoin, urlsplit
from weakref import WeakValueDictionary

import httpcore

from csm_jax.errors import InputError, first_line
from csm_jax.serve.admission.caller import INTERNAL, Caller
from csm_jax.serve.admission.thread_pools import FairThreadPool
from csm_jax.serve.network.addresses import parse_address
from csm_jax.serve.network.special_addresses import is_public

MAX_REDIRECTS = 3
# Time limit for the response of a webhook's receiver.
POST_SECONDS = 20.0
# Connections at once: for all fetches, for those of one share, and for all webhooks.
_MAX_FETCHES, _FETCHES_OF_SHARE, _MAX_POSTS = 64, 4, 64
# Threads that resolve host names. A name server that a client controls can take half a minute.
_NAME_THREADS = 8
# The caller of the current request, which httpcore does not pass on to the network backend.
_caller: ContextVar[Caller] = ContextVar("caller", default=INTERNAL)
_Headers = dict[bytes | str, bytes | str]
_REDIRECTS = (301, 302, 303, 307, 308)
_TIMEOUTS = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), 10.0)}


class OutboundHTTP:
    """An HTTP client for URLs that the server's clients choose."""

    def __init__(self, allow_private: bool):
        """Opens a pool of connections.

        Args:
          allow_private: allows addresses of private networks and of this machine.
        """
        # Made once, because reading the certificates of all authorities takes 0.1 s.
        context = httpcore.default_ssl_context()
        self._resolvers = FairThreadPool(_NAME_THREADS, "csm_jax.serve.names")

        def open_pool(max_connections: int) -> httpcore.AsyncConnectionPool:
            return httpcore.AsyncConnectionPool(
                ssl_context=context,
                network_backend=_CheckedBackend(allow_private, self._resolvers),
                max_connections=max_connections,
                max_keepalive_connections=0,
            )

        self._fetches = open_pool(_MAX_FETCHES)
        self._posts = open_pool(_MAX_POSTS)
        self._post_slots = asyncio.Semaphore(_MAX_POSTS)
        self._fetch_slots = WeakValueDictionary[str, asyncio.Semaphore]()

    async def close(self) -> None:
        await self._fetches.aclose()
        await self._posts.aclose()
        self._resolvers.close()

    async def fetch(self, url: str, max_bytes: int, seconds: float, share: str = "") -> bytes:
        """Fetches the body at a URL.

        Args:
          share: of the caller; beyond a few fetches of one share the others wait.

        Raises:
          InputError: it cannot be fetched, or is beyond a limit.
        """
        _caller.set(Caller(share=share))
        slot = self._fetch_slots.setdefault(share, asyncio.Semaphore(_FETCHES_OF_SHARE))
        try:
            async with asyncio.timeout(seconds), slot:
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
        """Posts JSON, and returns the status of the response, whose body is not read.

        Redirects are not followed.

        Args:
          share: of the caller, by which host names are resolved fairly.

        Raises:
          InputError: there is no response.
        """
        check_url(url)
        _caller.set(Caller(share=share))
        sent: _Headers = {"Content-Type": "application/json", **headers}
        try:
            # The time starts when there is a free connection.
            async with (
                self._post_slots,
                asyncio.timeout(POST_SECONDS),
                self._posts.stream(
                    "POST", url, headers=sent, content=body, extensions=_TIMEOUTS
                ) as response,
            ):
                return response.status
        except TimeoutError as error:
            raise InputError(f"{url[:200]}: took more than {POST_SECONDS:g} s") from error
        except _FAILURES as error:
            raise InputError(f"{url[:200]}: cannot be reached ({first_line(error)})") from error

    async def _get(self, url: str, max_bytes: int) -> tuple[bytes | None, str]:
        """The body and its URL, or None and the URL of a redirect."""
        check_url(url)
        async with self._open(url) as response:
            headers = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in headers:
                return None, urljoin(url, headers[b"location"].decode("latin-1"))
            if response.status != 200:
                raise InputError(f"{url[:200]}: answered with status {response.status}")
            data = bytearray()
            async for piece in response.aiter_stream():
                data += piece
                if len(data) > max_bytes:
                    raise InputError(f"{url[:200]}: more than {max_bytes} bytes")
        return bytes(data), url

    @contextlib.asynccontextmanager
    async def _open(self, url: str) -> AsyncIterator[httpcore.Response]:
        # A compressed body could unpack to any size.
        headers: _Headers = {"Accept-Encoding": "identity", "User-Agent": "csm-jax"}
        async with self._fetches.stream(
            "GET", url, headers=headers, extensions=_TIMEOUTS
        ) as response:
            yield response


_FAILURES = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
    OSError,
    UnicodeError,
)


def check_url(url: str) -> None:
    """Raises `InputError` for a text that is not a URL of http(s), or contains a password."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        has_password = "@" in parts.netloc
    except ValueError:
        is_good = has_password = False
    is_plain = url.isascii() and url.isprintable() and len(url) <= 2048
    if not is_good or has_password or not is_plain:
        raise InputError(f"{url[:200]!r} is not a usable http or https URL")


async def public_address(
    resolvers: FairThreadPool, host: str, port: int, allow_private: bool
) -> str:
    """Resolves a host. Raises `InputError` unless all its addresses are public.

    Args:
      resolvers: the threads that resolve names. Slow name servers would block those of the event
        loop, which are for everything.
    """
    kind = socket.SOCK_STREAM
    found = await resolvers.run(
        _caller.get(), socket.getaddrinfo, host, port, socket.AF_UNSPEC, kind
    )
    addresses = [str(entry[4][0]) for entry in found]
    if not allow_private:
        _check_public(host, addresses)
    return addresses[0]


def _check_public(host: str, addresses: Iterable[str]) -> None:
    for text in addresses:
        address = parse_address(text)
        if address is None or not is_public(address):
            raise InputError(f"{host} is not a public address")


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that `public_address` allows."""

    def __init__(self, allow_private: bool, resolvers: FairThreadPool):
        self._allow_private = allow_private
        self._resolvers = resolvers
        # httpcore defines the class in two ways, of which only one is a backend.
        self._inner = cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())

    async def connect_tcp(
        self, host: str, port: int, *args: Any, **kwargs: Any
    ) -> httpcore.AsyncNetworkStream:
        address = await public_address(self._resolvers, host, port, self._allow_private)
        return await self._inner.connect_tcp(address, port, *args, **kwargs)

    async def connect_unix_socket(self, *_: Any, **__: Any) -> NoReturn:
        raise httpcore.UnsupportedProtocol("sockets of this machine are not allowed")

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)
