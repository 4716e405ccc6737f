"""Files that a user names as outputs: replaced as a whole, or written through if they are streams.

A pipe (`mkfifo`, `>(...)` of a shell), a terminal and `/dev/stdout` cannot be replaced: another
program is at their other end.
"""

import errno
import os
import stat
from pathlib import Path

from csm_jax.io.files import check_file, replace_file


def is_stream(path: Path) -> bool:
    """Whether a path is, or leads to, a pipe or a character device."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # a path may have a zero among its bytes
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def open_stream(path: Path) -> int:
    """A descriptor to write to a stream with; waits until a pipe has a reader."""
    return os.open(path, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of `data`: one call may write only a part of it."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def write_output(path: Path, data: bytes) -> None:
    """Puts `data` at `path` as `replace_file` does, or writes it to the stream that is there.

    Raises `OSError` as the file system does.
    """
    if not is_stream(path):
        replace_file(path, data)
        return
    descriptor = open_stream(path)
    try:
        write_all(descriptor, data)
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raises `OSError` if `write_output` could not write `path` now; leaves nothing behind."""
    if not is_stream(path):
        check_file(path)
    # To open a pipe would wait for its reader, and to close it would end what the reader reads.
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
