"""Error responses: one body that the clients of all APIs understand.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}, "detail": ...}

OpenAI's clients read `error`, fal's and DeepInfra's `detail`. Below ElevenLabs' paths `detail` is
an object, as its clients expect.
"""

import logging
import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from csm_jax.errors import CSMError, InputError, QueueFullError, RequestCancelledError

logger = logging.getLogger("csm_jax.serve")

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}
_TYPES |= {413: "invalid_request_error", 429: "rate_limit_error"}
# Characters of a request that an error repeats.
_MAX_QUOTED = 200
ELEVENLABS_PATHS = ("/v1/text-to-speech/", "/v1/voices", "/v2/voices")
# Its names of errors, which its users' programs compare.
_ELEVENLABS_CODES = {"bad_key": "invalid_api_key", "too_long": "text_too_long"}
_TYPE_NAME = re.compile(r"(?:str|int|float|bool|dict|list|function-\w+|constrained-\w+)(?:\[.*)?")
# Seconds after which the queue is likely to have room.
RETRY_AFTER = 1
# Code of a WebSocket close, for a client that can try again later.
TRY_AGAIN_LATER = 1013


class ApiError(Exception):
    """An error response.

    Attributes:
      status: the HTTP status.
      param: the field that is wrong, if there is one.
      code: identifies the error for programs.
      retry_after: seconds after which the client can try again; None if that is useless.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "api_error")
        message = str(self)
        error = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, "detail": message}

    def response(self, path: str) -> JSONResponse:
        """The response to a request for a path, in the form of its API."""
        body = self.body
        if path.startswith(ELEVENLABS_PATHS):
            body["detail"] = _elevenlabs_detail(body["error"])
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(body, self.status, headers)


def _elevenlabs_detail(error: dict) -> dict:
    code = _ELEVENLABS_CODES.get(error["code"], error["code"]) or error["type"]
    return error | {"code": code, "status": code}


class ClientGoneError(Exception):
    """The client has closed the connection."""


class StorageError(CSMError):
    """The database cannot be read or written."""


class StorageFullError(StorageError):
    """The disk has no room."""


class QuotaError(CSMError):
    """An owner, or all owners together, would store more than the limits allow."""


def as_api_error(error: Exception) -> ApiError:
    """The `ApiError` that the client receives for an exception."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", retry_after=RETRY_AFTER)
        case QuotaError():
            return ApiError(429, str(error), code="storage_full", retry_after=60)
        case StorageFullError():
            return ApiError(507, str(error), code="disk_full", retry_after=60)
        case StorageError():
            return ApiError(503, str(error), code="storage_failed", retry_after=10)
        case InputError():
            return ApiError(400, str(error))
        case RequestValidationError():
            return as_bad_field(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case ClientGoneError() | ClientDisconnect() | RequestCancelledError():
            # 499 is nginx's for it; only the log sees it.
            return ApiError(499, "the client closed the connection", code="client_gone")
        case CSMError():
            return ApiError(503, str(error), code="unavailable", retry_after=RETRY_AFTER)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def as_bad_field(error: RequestValidationError | ValidationError) -> ApiError:
    """The first of the errors that pydantic has found."""
    if isinstance(error, ValidationError):
        # Without the input, which can be large, and without the other errors.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    else:
        first = error.errors()[0]
    # FastAPI puts "body" before the names of fields.
    outside = ("body",) if isinstance(error, RequestValidationError) else ()
    names = [str(part) for part in first["loc"] if part not in outside]
    # pydantic names the type of a union that it tried.
    names = names[:1] + [name for name in names[1:] if not _TYPE_NAME.fullmatch(name)]
    where = ".".join(names)[:_MAX_QUOTED]
    what = first["msg"][:_MAX_QUOTED]
    message = f"{where}: {what}" if where else what
    return ApiError(400, message, param=where or None, code=first["type"])


def _as_wrong_route(app: FastAPI, method: str, path: str, error: HTTPException) -> ApiError:
    """The error of a path that is not there, or has no such method: what may have been meant."""
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ApiError(405, f"{method} is not possible here; send {allowed}")
    if error.status_code != 404 or error.detail != "Not Found":
        return as_api_error(error)
    paths = app.openapi()["paths"]
    # A base URL without /v1, or with it twice, is a usual mistake.
    near = sorted(each for each in paths if len(each) > 1 and _is_meant(each, path.rstrip("/")))
    hint = f"send it to {near[0]}" if near else "/docs lists what there is"
    return ApiError(404, f"there is nothing at {path[:_MAX_QUOTED]}; {hint}")


def _is_meant(route: str, path: str) -> bool:
    return route == f"/v1{path}" or path.endswith(route)


def install(app: FastAPI) -> None:
    """Adds handlers to an application, so that all errors have the same body."""

    def respond(request: Request, error: Exception) -> JSONResponse:
        path = request.scope["path"]
        if isinstance(error, HTTPException):
            response = _as_wrong_route(app, request.method, path, error).response(path)
            response.headers.update(error.headers or {})
            return response
        return as_api_error(error).response(path)

    kinds = (ApiError, CSMError, ClientGoneError, ClientDisconnect)
    for kind in (*kinds, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(Exception, respond)
