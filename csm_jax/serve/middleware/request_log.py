"""The request log: an id for each request, and a line of JSON at the end of its response."""

import contextvars
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from csm_jax.serve.metrics import Metrics
from csm_jax.serve.middleware.redaction import REDACTED

logger = logging.getLogger("csm_jax.serve")

_HEADER = b"x-request-id"
# Characters of a path and a method that are logged: refused requests are logged too, and a head can
# have 64 kB.
_MAX_PATH, _MAX_METHOD = 200, 20
# Files of fal's API can be fetched by their names alone, so these are not logged.
_CAPABILITY = re.compile(r"^(.*(?<!/v1)/files/)[^/]+$", re.DOTALL)
# Ids that callers may choose for their requests.
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_current: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("request")


def add_log_fields(**fields: object) -> None:
    """Adds fields to the log line of the current request, if there is one."""
    if (known := _current.get(None)) is not None:
        known.update(fields)


def request_id() -> str:
    """The id of the current request; "" outside of a request."""
    return _current.get({}).get("request_id", "")


class RequestLogMiddleware:
    """The outermost middleware, which assigns ids to requests, and counts and logs responses."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        fields = {
            "request_id": _id_of(scope) or uuid.uuid4().hex,
            "method": scope.get("method", "WEBSOCKET")[:_MAX_METHOD],
            "path": _CAPABILITY.sub(rf"\1{REDACTED}", scope["path"][:_MAX_PATH]),
            "status": 0,
        }
        _current.set(fields)

        async def send_with_id(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                fields["status"] = message.get("status", 101)
                name = (_HEADER, fields["request_id"].encode())
                message = {**message, "headers": [*message.get("headers", ()), name]}
            await send(message)

        started = time.perf_counter()
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            fields["total_s"] = round(time.perf_counter() - started, 4)
            # A label for each unknown path would be a label for anything that clients send.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, fields["status"]).inc()
            logger.info(json.dumps(fields))


def _id_of(scope: Scope) -> str | None:
    given = dict(scope["headers"]).get(_HEADER, b"")
    return given.decode() if _ID.fullmatch(given) else None
