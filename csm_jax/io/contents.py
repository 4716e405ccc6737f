"""What a file holds instead of what its name says."""

import re
from pathlib import Path

from csm_jax.errors import first_line

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
