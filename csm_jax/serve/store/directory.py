"""The directory of a server's database: private to its user, and locked by one server."""

import contextlib
import fcntl
import logging
import os
import stat
from pathlib import Path

from csm_jax.errors import OutputError

logger = logging.getLogger("csm_jax.serve")

DATABASE = "store.sqlite"
_LOCK = "lock"
_RESERVE = "reserve"
_OURS = (_LOCK, _RESERVE, *(DATABASE + suffix for suffix in ("", "-wal", "-shm", "-journal")))
# Reserved space, which is released on a full disk, because deleting rows writes a log first.
RESERVE_BYTES = 1_000_000


class Directory:
    """A locked directory. The lock ends with `close` or with the process, however it ends."""

    def __init__(self, path: Path):
        """Creates the directory if it is missing, locks it, and makes it private.

        Raises:
          OutputError: it cannot be used, or another server uses it.
        """
        self._path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                self._make_private()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(
                f"--data {printable(path)} cannot be used ({reason}): name a directory that this "
                "user owns and can write to"
            ) from error
        self.keep_reserve()

    @property
    def database(self) -> Path:
        return self._path / DATABASE

    def close(self) -> None:
        """Releases the lock."""
        os.close(self._lock)

    def is_intact(self) -> bool:
        """Whether the lock is still where other servers look for it."""
        try:
            return os.path.samestat(os.fstat(self._lock), os.lstat(self._path / _LOCK))
        except OSError:
            return False

    def keep_reserve(self) -> None:
        """Reserves space on the disk, if there is some."""
        with contextlib.suppress(OSError):
            reserve = _create(self._path / _RESERVE)
            try:
                os.posix_fallocate(reserve, 0, RESERVE_BYTES)
            finally:
                os.close(reserve)

    def release_reserve(self) -> None:
        """Releases the reserved space."""
        with contextlib.suppress(OSError):
            (self._path / _RESERVE).unlink()

    def _take_lock(self) -> int:
        lock = _create(self._path / _LOCK)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise OutputError(
                f"--data {printable(self._path)} is in use by another server: "
                "stop it, or name another directory"
            ) from error
        return lock

    def _make_private(self) -> None:
        names = set(os.listdir(self._path))
        # A directory with other files, such as a home directory, keeps its mode.
        if names - {_LOCK} and not names & set(_OURS) - {_LOCK}:
            logger.warning(
                "--data %s holds other files, so its permissions stay as they are; a directory of "
                "its own would be private",
                printable(self._path),
            )
        else:
            _chmod(self._path, 0o700)
        for name in names.intersection(_OURS):
            path = self._path / name
            if not stat.S_ISREG(path.lstat().st_mode):
                raise OutputError(f"{printable(path)} is not a regular file: move it away")
            _chmod(path, 0o600)
        # Created here, because the database's log gets the mode of the database.
        os.close(_create(self.database))


_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def _create(path: Path) -> int:
    """Opens a file, or creates it, with a private mode regardless of the umask."""
    descriptor = os.open(path, _FLAGS, 0o600)
    with contextlib.suppress(PermissionError):  # another user's, which `_chmod` reports
        os.fchmod(descriptor, 0o600)
    return descriptor


def _chmod(path: Path, mode: int) -> None:
    """Sets a mode, unless the path has it already or belongs to another user."""
    if stat.S_IMODE(path.stat().st_mode) == mode:
        return
    try:
        path.chmod(mode)
    except PermissionError:
        logger.warning("%s belongs to another user and keeps its permissions", printable(path))


def printable(path: Path) -> str:
    """The path as text on one line."""
    return str(path) if str(path).isprintable() else repr(str(path))
