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


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to be quoted in a message of this one."""
    return (str(error).splitlines() or [type(error).__name__])[0]
