"""HTTP requests to URLs that clients choose: public addresses only, within limits."""

import asyncio
import socket
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpcore
import pytest

from csm_jax.errors import InputError
from csm_jax.serve.admission.thread_pools import FairThreadPool
from csm_jax.serve.network import outbound_http as outgoing_module
from csm_jax.serve.network.outbound_http import OutboundHTTP, check_url, public_address


@pytest.fixture
def names(monkeypatch):
    """A fake resolver, which returns one list of addresses after the other."""
    known = {}

    def getaddrinfo(host, port, *_):
        found = known[host]
        if isinstance(found[0], list):
            found = found.pop(0)
        return [(0, 0, 0, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


def resolve(host: str, allow_private: bool = False) -> str:
    return asyncio.run(public_address(FairThreadPool(1, "names"), host, 80, allow_private))


PRIVATE = [
    *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254"),
    # Never connected to, because it is refused as the URL of a recording.
    *("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1"),  # noqa: S104
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
    *("::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "2001:0:7f00:1::"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused(names, address):
    names["host"] = [address]
    with pytest.raises(InputError, match="not a public address"):
        resolve("host")
    assert resolve("host", allow_private=True) == address


def test_one_private_address_among_public_ones_is_refused(names):
    names["host"] = ["93.184.216.34", "127.0.0.1"]
    with pytest.raises(InputError):
        resolve("host")


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::"])
def test_public_addresses_are_connected_to(names, address):
    names["host"] = [address]
    assert resolve("host") == address


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.hosts.append(self.headers["Host"])
        time.sleep(self.server.delay)
        status, headers, body = self.server.pages[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in body:
            if isinstance(piece, float):
                time.sleep(piece)
            else:
                self.wfile.write(piece)

    def do_POST(self):
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hosts, server.pages, server.delay = [], {}, 0.0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()


def fetch(url: str, allow_private: bool = True, max_bytes: int = 1000, seconds: float = 5) -> bytes:
    async def work() -> bytes:
        outbound_http = OutboundHTTP(allow_private)
        try:
            return await outbound_http.fetch(url, max_bytes, seconds)
        finally:
            await outbound_http.close()

    return asyncio.run(work())


def test_the_body_at_a_url_is_fetched(site):
    site.pages["/a"] = 200, {}, [b"one", b"two"]
    site.pages["/r"] = 302, {"Location": "/a"}, []
    assert fetch(f"{site.url}/a") == b"onetwo"
    assert fetch(f"{site.url}/r") == b"onetwo"


def test_the_connection_uses_the_address_that_was_checked(site, names):
    """The name is resolved once, so another answer the next time changes nothing."""
    names["good.example"] = [["127.0.0.1"], ["10.9.9.9"]]
    site.pages["/a"] = 200, {}, [b"one"]
    url = f"http://good.example:{site.server_port}/a"
    assert fetch(url) == b"one"
    assert site.hosts == [f"good.example:{site.server_port}"]
    assert len(names["good.example"]) == 1


def test_a_redirect_is_checked_too(site, names, monkeypatch):
    """A redirect from a public host to a private one."""
    names["good.example"], names["bad.example"] = ["93.184.216.34"], ["127.0.0.1"]
    site.pages["/a"] = 302, {"Location": f"http://bad.example:{site.server_port}/secret"}, []
    site.pages["/secret"] = 200, {}, [b"secret"]
    connect = httpcore.AnyIOBackend.connect_tcp

    async def to_the_site(self, host, port, *args, **kwargs):
        # The only public address here is that of the site.
        host = "127.0.0.1" if host == "93.184.216.34" else host
        return await connect(self, host, port, *args, **kwargs)

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", to_the_site)
    with pytest.raises(InputError, match=r"bad.example is not a public address"):
        fetch(f"http://good.example:{site.server_port}/a", allow_private=False)
    assert len(site.hosts) == 1


def test_private_ip_addresses_in_urls_are_refused(site):
    site.pages["/a"] = 200, {}, [b"one"]
    for url in (f"{site.url}/a", f"http://localhost:{site.server_port}/a", "http://2130706433/"):
        with pytest.raises(InputError, match="not a public address"):
            fetch(url, allow_private=False)
    assert not site.hosts


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://host/a", "gopher://host/", "unix:///var/run/docker.sock"),
        *("http://", "http:///a", "//host/a", "host", "", "http://name:word@host/"),
        *("http://[::1", "http://host:99999/", "http://host:0/", "http://hö.de/"),
        *("http://host/\r\nX: y", "http://" + "a" * 3000),
    ],
)
def test_only_http_urls_are_fetched(url):
    with pytest.raises(InputError):
        fetch(url)


@pytest.mark.parametrize(
    "url", ["http://a\x1b[2J/", "http://a/\x07", "http://a\nb/", "http://a\x7f/"]
)
def test_urls_with_control_characters_are_refused(url):
    """The host of a webhook that cannot be reached is logged."""
    with pytest.raises(InputError, match="not a usable http or https URL") as raised:
        check_url(url)
    assert str(raised.value).isprintable()


def test_size_time_and_redirects_are_limited(site):
    site.pages["/large"] = 200, {}, [b"x" * 600, b"x" * 600]
    site.pages["/slow"] = 200, {}, [b"x", 3.0, b"x"]
    site.pages["/round"] = 302, {"Location": "/round"}, []
    site.pages["/gone"] = 404, {}, []
    site.pages["/file"] = 302, {"Location": "file:///etc/passwd"}, []
    for path, message in {
        "/large": "more than 1000 bytes",
        "/slow": "took more than 0.5 s",
        "/round": "more than 3 redirects",
        "/gone": "status 404",
        "/file": "not a usable http or https URL",
    }.items():
        with pytest.raises(InputError, match=message):
            fetch(f"{site.url}{path}", seconds=0.5)


def test_compressed_bodies_are_not_unpacked(site):
    """The request asks for no compression; a compressed body stays as it is."""
    site.pages["/a"] = 200, {"Content-Encoding": "gzip"}, [b"\x1f\x8b"]
    assert fetch(f"{site.url}/a") == b"\x1f\x8b"


def test_the_response_body_of_a_webhook_is_not_read(site):
    """With a large body, and with a slow one."""
    site.pages["/hook"] = 201, {}, [b"a" * 1000, 1.0] * 20

    async def work() -> int:
        outbound_http = OutboundHTTP(allow_private=True)
        try:
            return await outbound_http.post(f"{site.url}/hook", b"{}", {})
        finally:
            await outbound_http.close()

    started = time.monotonic()
    assert asyncio.run(work()) == 201
    assert time.monotonic() - started < 5


def use(work):
    """The result of `work(outbound_http)`."""

    async def run():
        outbound_http = OutboundHTTP(allow_private=True)
        try:
            return await work(outbound_http)
        finally:
            await outbound_http.close()

    return asyncio.run(run())


@pytest.fixture
def silent():
    """The address of a server that accepts connections but never responds."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_certificates_are_read_once(silent, monkeypatch):
    """Reading them for each connection would block the event loop."""

    async def work(outbound_http: OutboundHTTP) -> None:
        monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", pytest.fail)
        with pytest.raises(InputError, match=r"took more than 0.3 s"):
            await outbound_http.fetch(f"https://{silent}/", 1000, 0.3)

    use(work)


def test_slow_fetches_of_one_caller_delay_neither_others_nor_webhooks(site):
    site.pages["/slow"] = 200, {}, [b"x", 2.0, b"x"]
    site.pages["/a"] = 200, {}, [b"one"]

    async def work(outbound_http: OutboundHTTP) -> float:
        slow = [
            asyncio.create_task(outbound_http.fetch(f"{site.url}/slow", 1000, 20.0, "many"))
            for _ in range(80)
        ]
        await asyncio.sleep(0.2)
        started = time.monotonic()
        assert await outbound_http.fetch(f"{site.url}/a", 1000, 5.0, "one") == b"one"
        assert await outbound_http.post(f"{site.url}/a", b"{}", {}) == 200
        seconds = time.monotonic() - started
        for each in slow:
            each.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return seconds

    assert use(work) < 1.5


def test_slow_name_servers_delay_neither_other_callers_nor_the_event_loop_s_threads(
    site, monkeypatch
):
    """A client that has a name server can let it take as long as it likes."""
    site.pages["/a"] = 200, {}, [b"one"]
    port, stop = site.server_port, threading.Event()

    def getaddrinfo(host, port, *_):
        if host == "slow.example":
            stop.wait(20)
        return [(0, 0, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def work(outbound_http: OutboundHTTP) -> float:
        for _ in range(20):
            with pytest.raises(InputError, match="took more than"):
                await outbound_http.fetch("http://slow.example/", 1000, 0.03, "slow")
        started = time.monotonic()
        await asyncio.to_thread(time.sleep, 0)
        url = f"http://fast.example:{port}/a"
        assert await outbound_http.fetch(url, 1000, 5.0, "other") == b"one"
        seconds = time.monotonic() - started
        stop.set()
        return seconds

    assert use(work) < 2


def test_waiting_for_a_connection_does_not_count_towards_the_timeout(site, monkeypatch):
    monkeypatch.setattr(outgoing_module, "_MAX_POSTS", 1)
    monkeypatch.setattr(outgoing_module, "POST_SECONDS", 1.0)
    site.delay = 0.4
    site.pages["/hook"] = 200, {}, []

    async def work(outbound_http: OutboundHTTP) -> list[int]:
        posts = [outbound_http.post(f"{site.url}/hook", b"{}", {}) for _ in range(4)]
        return await asyncio.gather(*posts)

    assert use(work) == [200] * 4


def test_a_silent_receiver_of_a_webhook_times_out(silent, monkeypatch):
    monkeypatch.setattr(outgoing_module, "POST_SECONDS", 0.3)
    with pytest.raises(InputError, match=r"took more than 0.3 s"):
        use(lambda outbound_http: outbound_http.post(f"http://{silent}/", b"{}", {}))


def test_redirects_of_a_receiver_are_not_followed(site):
    site.pages["/hook"] = 307, {"Location": "/other"}, []
    assert use(lambda outbound_http: outbound_http.post(f"{site.url}/hook", b"{}", {})) == 307
    assert len(site.hosts) == 1


@pytest.mark.parametrize(
    "headers", [{"A": "b" * 500_000}, {f"A{i}": "b" * 90 for i in range(5000)}]
)
def test_large_response_heads_are_refused(site, headers):
    site.pages["/a"] = 200, headers, [b"one"]
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch(f"{site.url}/a")
    with pytest.raises(InputError, match="cannot be reached"):
        use(lambda outbound_http: outbound_http.post(f"{site.url}/a", b"{}", {}))


def test_all_redirects_share_one_time_limit(site):
    site.delay = 0.4
    site.pages["/round"] = 302, {"Location": "/round"}, []
    with pytest.raises(InputError, match=r"took more than 0.5 s"):
        fetch(f"{site.url}/round", seconds=0.5)
