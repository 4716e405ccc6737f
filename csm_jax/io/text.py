"""Text files that users write: UTF-8, with or without the byte order mark of some editors."""

import codecs
from pathlib import Path

from csm_jax.errors import InputError, first_line
from csm_jax.io.contents import mistaken_content

# Longest first: the mark of UTF-32 begins with that of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path, name: str | None = None) -> str:
    """The text of a file, with its line ends as they are.

    Args:
      name: what errors call it; None is the path.

    Raises:
      InputError: it cannot be read, or is in another encoding.
    """
    name = str(path) if name is None else name
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a path may have a zero among its bytes
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{name} cannot be read: {reason}") from error
    return decode_text(data, name)


def decode_text(data: bytes, name: str) -> str:
    """The text of a file's bytes; raises `InputError`, which calls it `name`, as `read_text`."""
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise InputError(f"{name} cannot be read as UTF-8: it is {encoding}; save it as UTF-8")
    if what := mistaken_content(data[:256]):
        raise InputError(f"{name} is {what}")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise InputError(
            f"{name} cannot be read as text: line {line} has a zero byte; it may be UTF-16, or no "
            "text at all: save it as UTF-8"
        )
    try:
        # Files that were joined have a mark inside too, at the beginning of a line.
        return data.decode("utf-8-sig").replace("\n\ufeff", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name} cannot be read as UTF-8: line {line} has the byte 0x{data[error.start]:02x}; "
            "it may be Latin-1: save it as UTF-8"
        ) from error
