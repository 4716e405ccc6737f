"""The errors whose message is meant for the user: a command prints one line of it and exits with 2.

    CSMError
      InputError              also a ValueError
      CheckpointError         also a ValueError
      OutputError
        BusyError
      QueueFullError
      EngineClosedError
      RequestCancelledError

An argument or a file that cannot be used is a `ValueError`, as everywhere in Python. The others
depend on the machine or on the moment: the same call can succeed later.
"""

import re
from pathlib import Path


class CSMError(Exception):
    """Base of all errors whose message is meant for the user."""


class InputError(CSMError, ValueError):
    """Text, audio, a sampling value or a script that cannot be used."""


class CheckpointError(CSMError, ValueError):
    """A checkpoint, config or tokenizer that is missing, damaged or of another layout."""


class OutputError(CSMError):
    """A file, directory or stream that cannot be written."""


class BusyError(OutputError):
    """A file or directory that another process is writing."""


class QueueFullError(CSMError):
    """The engine's queue of waiting requests is full."""


class EngineClosedError(CSMError):
    """The engine is closed and takes no more requests."""


class RequestCancelledError(CSMError):
    """The request was cancelled before it was finished."""


# The former name, which is that of a `BaseException` in asyncio.
CancelledError = RequestCancelledError


# What is often found under the name of another file, by its first bytes.
_CONTENTS = (
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS to the file: run git lfs pull"),
    (
        re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|\?xml[^>]*>\s*<error>)", re.IGNORECASE),
        "a web page: download the file itself, logged in if need be",
    ),
    (
        re.compile(rb"GGUF.\0\0\0", re.DOTALL),
        "a GGUF file, which is not read: use the model.safetensors of the model",
    ),
)


def mistaken_content(head: bytes) -> str | None:
    """What a file is that is not what its name says, and what to do, for a message.

    Args:
      head: its first bytes.
    """
    return next((what for start, what in _CONTENTS if start.match(head)), None)


def mistaken_file(path: Path) -> str | None:
    """`mistaken_content` of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return mistaken_content(file.read(256))
    except OSError:
        return None


def explain(error: BaseException, path: Path) -> str:
    """Why a file cannot be read: what it is instead, or else another library's message."""
    what = mistaken_file(path)
    return f"it is {what}" if what else first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to be quoted in a message of this one."""
    return (str(error).splitlines() or [type(error).__name__])[0]
