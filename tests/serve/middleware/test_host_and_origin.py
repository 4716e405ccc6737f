"""Host and Origin headers, trusted proxies, HEAD, and request targets."""

import socket

import httpx
import pytest
from small import ask, echo, open_socket
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from csm_jax.serve.middleware.head import HeadMiddleware
from csm_jax.serve.middleware.host_and_origin import (
    HostOriginMiddleware,
    check_names,
    check_origins,
)
from csm_jax.serve.network.addresses import check_proxies, is_proxy


def served(
    names=("speech.example.com",), origins=("https://app.example.com",)
) -> HostOriginMiddleware:
    return HostOriginMiddleware(echo, names, origins)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((name, 200) for name in ("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:80")),
        *((name, 200) for name in ("[::1]:8000", "10.1.2.3", "Speech.Example.com:443")),
        *((name, 421) for name in ("evil.example", "evil.example:8000", "localhost.evil.example")),
        *((name, 421) for name in ("evil-localhost", "127.0.0.1.evil.example", "x.localhost")),
        *((name, 421) for name in ("0x7f.1", "1.2.3", "speech.example.com.evil.example")),
        *((name, 400) for name in ("", "a b", "localhost:", "localhost:x", "user@localhost")),
        *((name, 400) for name in ("localhost/x", "[::1", "localhost:123456", "a,localhost")),
        *((name, 400) for name in ("localhost\t", "l\xf6calhost", "localhost#", "localhost?x")),
    ],
)
def test_other_host_headers_are_refused(host, status):
    response = ask(served(), headers={"Host": host.encode("latin-1")})
    assert response.status_code == status
    socket = open_socket(served(), headers={"host": host})
    assert (socket.status == 101) == (status == 200)


def test_a_refusal_names_the_flag_that_allows_the_host():
    message = ask(served(), headers={"Host": "csm:8000"}).json()["detail"]
    assert "--allowed_hosts=csm" in message
    assert ask(served(("*",)), headers={"Host": "csm:8000"}).status_code == 200


def test_two_host_headers_get_400():
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert ask(served(), headers=headers).status_code == 400


OWN = {"Host": "localhost:8000"}


@pytest.mark.parametrize(
    ("origin", "is_own"),
    [
        *((origin, True) for origin in ("http://localhost:8000", "HTTP://LOCALHOST:8000")),
        ("https://app.example.com", True),
        *((origin, False) for origin in ("https://evil.example", "null", "http://localhost")),
        *((origin, False) for origin in ("https://localhost:8000", "http://localhost:8001")),
        *((origin, False) for origin in ("http://127.0.0.1:8000", "http://localhost:8000.evil.x")),
        *((origin, False) for origin in ("http://app.example.com", "", "file://", "localhost")),
        *((origin, False) for origin in ("http://localhost:8000 x", "http://x@localhost:8000")),
    ],
)
def test_pages_of_other_origins_are_refused(origin, is_own):
    headers = OWN | {"Origin": origin}
    expected = 200 if is_own else 403
    for method in ("POST", "DELETE", "PUT", "PATCH"):
        assert ask(served(), method=method, headers=headers).status_code == expected
    # The browser itself prevents them from reading responses.
    assert ask(served(), headers=headers).status_code == 200
    socket = open_socket(served(), headers={"host": OWN["Host"], "origin": origin})
    assert socket.status == (101 if is_own else 403)


def test_an_origin_with_the_default_port_is_the_same_origin():
    for host, origin in (("10.0.0.1", "http://10.0.0.1:80"), ("10.0.0.1:80", "http://10.0.0.1")):
        headers = {"Host": host, "Origin": origin}
        assert ask(served(), method="POST", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)],
)
def test_sec_fetch_site_is_checked_without_an_origin(site, status):
    headers = OWN | {"Sec-Fetch-Site": site}
    assert ask(served(), method="POST", headers=headers).status_code == status


def test_two_origin_headers_are_refused():
    headers = [
        ("Host", "localhost"),
        ("Origin", "http://localhost"),
        ("Origin", "http://localhost"),
    ]
    assert ask(served(), method="POST", headers=headers).status_code == 403


def test_a_star_allows_any_origin():
    headers = OWN | {"Origin": "null"}
    assert ask(served(origins=("*",)), method="POST", headers=headers).status_code == 200


def test_invalid_names_and_origins_are_refused_at_the_start():
    check_names(["*", "a.example"])
    check_origins(["*", "https://a.example", "http://localhost:8000"])
    check_proxies(["10.0.0.1", "10.0.0.0/8", "::1", "fd00::/8"])
    for name in ("https://a.example", "a.example:80", "[::1]", ""):
        with pytest.raises(ValueError, match="host name"):
            check_names([name])
    for origin in ("a.example", "https://a.example/", "null", "ftp://a"):
        with pytest.raises(ValueError, match="origin"):
            check_origins([origin])
    for proxy in ("nginx", "*", "10.0.0.1/8", ""):
        with pytest.raises(ValueError, match="network"):
            check_proxies([proxy])


def test_forwarded_addresses_of_trusted_proxies_only_are_used():
    trusting = ProxyHeadersMiddleware(echo, ["10.0.0.0/8"])
    headers = {"X-Forwarded-For": "198.51.100.1, 203.0.113.7", "X-Forwarded-Proto": "https"}
    through = ask(trusting, headers=headers, client="10.0.0.1").json()["client"][0]
    # The address that the proxy saw, not the one that its client wrote.
    assert through == "203.0.113.7"
    direct = ask(trusting, headers=headers, client="127.0.0.1").json()["client"][0]
    assert direct == "127.0.0.1"
    assert is_proxy("10.9.9.9", ["10.0.0.0/8"])
    assert not is_proxy("11.0.0.1", ["10.0.0.0/8"])


def test_head_requests_are_routed_as_get():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["method"])
        await echo(scope, receive, send)

    assert ask(HeadMiddleware(app), method="HEAD").status_code == 200
    ask(HeadMiddleware(app), method="POST")
    assert seen == ["GET", "POST"]


def test_the_server_installs_its_middleware(server):
    """The middleware in the order of the application."""
    response = httpx.head(server.url + "/healthz")
    assert (response.status_code, response.content) == (200, b"")
    assert httpx.head(server.url + "/generate").status_code == 405
    assert server.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
    foreign = {"Origin": "https://evil.example"}
    assert server.post("/generate", json={"text": "a"}, headers=foreign).status_code == 403
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}
    moved = server.get("/v1/models/", headers=forwarded)
    assert moved.headers["location"].startswith("http://localhost:")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET /healthz HTTP/1.1", 200),
        ("GET /healthz HTTP/2.0", 505),
        ("PRI * HTTP/2.0", 505),
        ("GET http://evil.example/healthz HTTP/1.1", 400),
        ("GET healthz HTTP/1.1", 400),
        ("OPTIONS * HTTP/1.1", 400),
        ("GET //healthz HTTP/1.1", 404),
        ("GET /healthz/.. HTTP/1.1", 404),
        ("GET /%68ealthz HTTP/1.1", 200),
        ("GET /healthz%2f.. HTTP/1.1", 404),
        ("GET /healthz?a=b HTTP/1.1", 200),
        ("TRACE /healthz HTTP/1.1", 405),
        ("CONNECT localhost:80 HTTP/1.1", 400),
    ],
)
def test_a_target_must_begin_with_a_slash(server, line, status):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as made:
        made.sendall(f"{line}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert made.recv(1000).split()[1] == str(status).encode()
