"""Removes credentials from logs, by a filter on every logger that may write about a request."""

import logging
import re
import traceback
from urllib.parse import unquote_plus

# uvicorn logs the path of every WebSocket, and at its debug level all headers.
LOGGERS = ("csm_jax.serve", "uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
REDACTED = "[redacted]"
_PARAMETER = re.compile(r"([?&;])([^\s?&;=#\"']{1,200})=([^\s&;#\"'\])]*)")
# A key may have any of these characters in it: the server reads up to the next `&`.
_REST = re.compile(rf"(={re.escape(REDACTED)})[^\s&\"]+")
# Names of parameters whose values are credentials, decoded.
_SECRET = re.compile(r"key|token|secret|passw|auth|credential|signature|session|jwt", re.IGNORECASE)
_HEADER = re.compile(
    r"((?:authorization|xi?-api-key|cookie|sec-websocket-protocol)[\"']?\s*[:,]\s*b?[\"']?)[^\r\n\"']+",
    re.IGNORECASE,
)
# In a list of subprotocols, wherever that is printed.
_PROTOCOL = re.compile(r"(csm-key\.|openai-insecure-api-key\.)[^\s,\"'\])]+")


def redact(text: str) -> str:
    """The text without the values of credentials in query strings and headers."""
    text = _REST.sub(r"\1", _PARAMETER.sub(_redact_parameter, text))
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    return _PROTOCOL.sub(rf"\1{REDACTED}", text)


def _redact_parameter(found: re.Match) -> str:
    before, name, _ = found.groups()
    return f"{before}{name}={REDACTED}" if _SECRET.search(unquote_plus(name)) else found[0]


class RedactingFilter(logging.Filter):
    """Redacts the message of a record and the traceback that comes with it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


_FILTER = RedactingFilter()


def install() -> None:
    """Adds the filter to all loggers. A second call changes nothing."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
