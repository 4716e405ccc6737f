"""What a user did wrong. The command lines print one line of it and exit with code 2."""


class CSMError(ValueError):
    """Base of all errors whose message is meant for the user."""


class InputError(CSMError):
    """Text, audio, a sampling value or a script that cannot be used."""


class CheckpointError(CSMError):
    """A checkpoint, config or tokenizer that is missing, damaged or of another layout."""


class OutputError(CSMError):
    """Somewhere that cannot be written to."""


class BusyError(OutputError):
    """Somewhere that another process is writing to."""


class QueueFullError(CSMError):
    """As many requests wait for an engine as may."""


class CancelledError(CSMError):
    """The request was cancelled before it was over."""


def first_line(error: Exception) -> str:
    """What another library says went wrong, short enough to quote in a line of our own."""
    return (str(error).splitlines() or [type(error).__name__])[0]
