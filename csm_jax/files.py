"""Writing a file whole or not at all."""

import os
import secrets
from pathlib import Path


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
