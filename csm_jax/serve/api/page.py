"""The page on which users try the server: static files, whose scripts are a client of the APIs.

The files are read when the server starts, and only they are served: no path of a request reaches
the file system.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import PAGE_PATH

INDEX = "index.html"
DOCS = "docs.html"
DIRECTORY = Path(__file__).parents[1] / "static"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Forbids everything inline and from other hosts. A WebSocket of the same host is 'self' too.
# blob: is for recordings that are played before they are sent.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "media-src 'self' blob:",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
_HEADERS = {
    # A browser asks each time whether a file has changed, so that all are of one version.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=(), display-capture=()",
}


@dataclass(frozen=True)
class StaticFile:
    """A file of the page in memory."""

    data: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> "StaticFile":
        data = path.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        return cls(data, _MEDIA_TYPES[path.suffix], etag)

    def response(self, request: Request) -> Response:
        """The file, or 304 if the browser has it already."""
        headers = _HEADERS | {"ETag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


def router() -> APIRouter:
    """The routes of the page, of its files, and of the API's documentation.

    Redirects are relative, so that a proxy can serve the page below a prefix.
    """
    paths = [path for path in DIRECTORY.iterdir() if path.suffix in _MEDIA_TYPES]
    files = {path.name: StaticFile.read(path) for path in paths}
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    @routes.get(PAGE_PATH)
    def root() -> RedirectResponse:
        return RedirectResponse(f"{PAGE_PATH[1:]}/")

    @routes.head("/")
    def probe() -> Response:
        return Response()

    @routes.get("/docs")
    def docs() -> RedirectResponse:
        return RedirectResponse(f"{PAGE_PATH[1:]}/{DOCS}")

    @routes.get(f"{PAGE_PATH}/")
    def index(request: Request) -> Response:
        return files[INDEX].response(request)

    @routes.get(f"{PAGE_PATH}/{{name}}")
    def file(request: Request, name: str) -> Response:
        if name not in files:
            raise ApiError(404, "the page has no such file", code="not_found")
        return files[name].response(request)

    return routes
