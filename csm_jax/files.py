"""Writing a file whole or not at all; where to write."""

import os
import secrets
import tempfile
from pathlib import Path

from csm_jax.errors import OutputError


def replace_file(path: Path, data: bytes) -> None:
    """Puts `data` at `path`; after an error what stood there is still there, unchanged.

    Raises `OSError` as the file system does.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        # Not tempfile: its files are private to the user, and would stay so after the rename.
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """A directory that can be written to, with its parents; raises `OutputError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Trying is the only test that also knows of read-only disks, quotas and root.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written to ({error.strerror}): name another"
        ) from error
