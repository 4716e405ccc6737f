"""The files of the page over HTTP, and their headers."""

import re
from urllib.parse import urljoin

import httpx
import pytest
from fastapi import FastAPI
from small import ask

from csm_jax.serve import errors
from csm_jax.serve.api import page
from csm_jax.serve.middleware.head import HeadMiddleware
from csm_jax.serve.middleware.security_headers import SecurityHeadersMiddleware

app = FastAPI(docs_url=None, redoc_url=None)
app.include_router(page.router())
errors.install(app)
app.add_middleware(HeadMiddleware)
app.add_middleware(SecurityHeadersMiddleware)
FILES = sorted(path for path in page.DIRECTORY.iterdir() if path.is_file())
# URLs of other hosts; the namespace of SVG is only a name.
ADDRESS = re.compile(r"(?:https?:|wss?:)?//[\w.-]+\.\w+")
NAMESPACE = "http://www.w3.org/2000/svg"


def policy(response: httpx.Response) -> dict[str, list[str]]:
    directives = response.headers["content-security-policy"].split(";")
    return {name: values for name, *values in (each.split() for each in directives)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_has_its_headers(file):
    response = ask(app, f"/page/{file.name}")
    assert response.content == file.read_bytes()
    assert response.headers["content-type"].startswith(("text/", "image/svg+xml"))
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cross-origin-opener-policy"] == "same-origin"
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert "microphone=(self)" in response.headers["permissions-policy"]
    found = policy(response)
    assert found["default-src"] == found["base-uri"] == ["'none'"]
    assert found["frame-ancestors"] == found["form-action"] == ["'none'"]
    for name in ("script-src", "style-src", "connect-src"):
        assert found[name] == ["'self'"]
    assert not re.search("unsafe|https?:|\\*", response.headers["content-security-policy"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_contain_nothing_inline_and_no_other_hosts(file):
    text = file.read_text(encoding="utf-8")
    assert not ADDRESS.search(text.replace(NAMESPACE, ""))
    if file.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
        assert all(" src=" in tag for tag in re.findall(r"<script[^>]*>", text))
    if file.suffix == ".js":
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_files_refer_to_existing_files():
    names = {file.name for file in FILES}
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        found = re.findall(r"(?:href|src)=\"([\w.-]+)[#\"]|from \"\./([\w.-]+)\"", text)
        assert {first or second for first, second in found} <= names


def test_every_style_sheet_is_linked():
    linked = {}
    for file in FILES:
        if file.suffix == ".html":
            links = re.findall(r'<link rel="([^"]*)" href="([^"]*)"', file.read_text("utf-8"))
            assert {rel for rel, _ in links} <= {"stylesheet", "icon"}
            linked[file.name] = [name for rel, name in links if rel == "stylesheet"]
    assert sorted(linked["index.html"]) == [x.name for x in FILES if x.suffix == ".css"]
    assert linked["docs.html"]


@pytest.mark.parametrize("path", ["/", "/page", "/docs"])
def test_redirects_are_relative(path):
    """A proxy may serve the page below a prefix."""
    response = ask(app, path)
    assert response.status_code == 307
    target = urljoin(f"https://proxy.example/speech{path}", response.headers["location"])
    assert target.startswith("https://proxy.example/speech/page/")
    assert ask(app, target.removeprefix("https://proxy.example/speech")).status_code == 200


def test_unchanged_files_get_304():
    first = ask(app, "/page/main.js")
    assert first.headers["cache-control"] == "no-cache"
    headers = {"If-None-Match": first.headers["etag"]}
    again = ask(app, "/page/main.js", headers=headers)
    assert (again.status_code, again.content) == (304, b"")
    assert ask(app, "/page/style.css", headers=headers).status_code == 200
    assert ask(app, "/page/main.js", method="HEAD").headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize(
    "path",
    [
        "/page/page.py",
        "/page/../page.py",
        "/page/..%2fpage.py",
        "/page/%2e%2e%2fpage.py",
        "/page/..%5cpage.py",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/main.js%00",
        "/page/gradio_api/file=/etc/passwd",
        "/page/gradio_api/file/etc/passwd",
        "/page/config",
        "/static/main.js",
    ],
)
def test_other_paths_get_404(path):
    response = ask(app, path)
    assert response.status_code == 404
    assert b"root:" not in response.content


def test_posts_to_the_page_are_refused(server):
    """The page allows GET and HEAD only."""
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [file], "fn_index": 0, "session_hash": "a"}
    for path in ("queue/join", "upload", "run/predict", "call/speak"):
        response = server.post(f"/page/gradio_api/{path}", json=body)
        assert response.status_code in (404, 405)
    assert server.post("/page/", json=body).status_code == 405
    assert server.get("/page/gradio_api/file=/etc/passwd").status_code == 404


@pytest.mark.parametrize("path", ["/healthz", "/v1/models", "/nowhere", "/v1/audio/voices/slt"])
def test_responses_forbid_sniffing_of_their_type(server, path):
    assert server.get(path).headers["x-content-type-options"] == "nosniff"
