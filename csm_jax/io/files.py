"""Atomic files and directories: written beside their place and renamed, by one process at a time.

This file alone renames, by one rule of names. What becomes `NAME` is written beside it as
`.NAME.RANDOM.partial` and renamed at the end. Its writer holds `.NAME.lock`, a file that has the
name of the temporary one in it. The lock is the kernel's (`flock`), which frees it when its holder
ends, however that happens; the next holder removes what a killed one has left. Process ids are of
no use here: in two containers they name different processes, and process 1 of a container is always
alive.

On a file system without `flock`, writes are still atomic, because the temporary names are random;
but a second writer is not noticed, and what a killed one has left stays.
"""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from csm_jax.errors import BusyError, CSMError, OutputError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Seconds that a short write waits for another to the same place, and between two attempts.
PATIENCE, POLL = 10.0, 0.02
# How often a directory is removed that is not empty afterwards.
_ATTEMPTS = 50
_LONGEST_NAME = 100
_UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}
# Orbax and tensorstore quote the system's messages in errors of their own.
_QUOTED = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)]
_QUOTED += [os.strerror(code) for code in (errno.EACCES, errno.EPERM, errno.EIO)]

WAY_OUT = "choose a directory that exists, is writable and has space"
_WAIT = "wait for it to end, or choose another place"

logger = logging.getLogger("csm_jax")


@contextlib.contextmanager
def reporting(failure: str, way_out: str = WAY_OUT) -> Iterator[None]:
    """Turns a failed write in the block into an `OutputError`: "FAILURE (REASON): WAY OUT".

    A write fails with an `OSError`, or with an error of another library that has one as its cause.
    All other exceptions pass, and so do a closed pipe and errors that are meant for the user.
    """
    try:
        yield
    except (CSMError, BrokenPipeError):
        raise
    except BlockingIOError as error:
        raise BusyError(f"{failure} ({error.strerror}): {_WAIT}") from error
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OutputError(f"{failure} ({reason}): {way_out}") from error


def _reason(error: BaseException | None) -> str | None:
    """The system's message in an exception, or in one that caused it."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        for message in _QUOTED:
            if message in str(error):
                return message
        for each in getattr(error, "exceptions", ()):
            if reason := _reason(each):
                return reason
        hidden = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or hidden
    return None


@contextlib.contextmanager
def locked(target: Path, wait: float = 0.0) -> Iterator[io.FileIO | None]:
    """Holds the lock of a file to write, and gives the lock's file; None where there are no locks.

    Removes what a killed holder has left.

    Args:
      wait: seconds to wait for another holder.

    Raises:
      BlockingIOError: another process, or thread, still holds it.
      OSError: it cannot be made.
    """
    path = _beside(target, "lock")
    file = _acquire(path, time.monotonic() + wait)
    try:
        if file is not None:
            _remove_left(target, os.fsdecode(file.read()))
        yield file
    finally:
        if file is not None and fcntl is not None:
            # Removed before it is freed: a waiting process that gets it sees that its name is gone.
            if _is_at(file, path):
                path.unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked process may have inherited it
            file.close()


def is_locked(target: Path) -> bool:
    """Whether a process holds the lock of a file or directory."""
    if fcntl is None:
        return False
    try:
        with open(_beside(target, "lock"), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or there are no locks
        pass
    return False


def _acquire(path: Path, deadline: float) -> io.FileIO | None:
    while True:
        file = _open_lock(path)
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
            file.close()
            continue
        except BlockingIOError:
            file.close()
        except OSError as error:
            file.close()
            if error.errno not in _UNSUPPORTED:
                raise
            path.unlink(missing_ok=True)
            _warn_without_locks(path.parent)
            return None
        if time.monotonic() >= deadline:
            raise BlockingIOError(errno.EAGAIN, "another process is writing there")
        time.sleep(POLL)


def _open_lock(path: Path) -> io.FileIO:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        number = os.open(path, flags, 0o666)
    except OSError as error:
        if not os.path.lexists(path):
            raise
        raise OSError(
            error.errno,
            f"its lock {path.name} cannot be opened ({error.strerror}): remove it if no program "
            "writes there",
        ) from error
    file = io.FileIO(number, "r+")
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"its lock {path.name} is not a file: remove it")
    return file


def _is_at(file: io.FileIO, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


@functools.cache
def _warn_without_locks(directory: Path) -> None:
    logger.warning(
        "%s is on a file system without locks: let one process at a time write there", directory
    )


def _beside(target: Path, suffix: str) -> Path:
    """The path `.NAME.SUFFIX`; a digest replaces a name that would become too long."""
    name = os.fsencode(target.name)
    if len(name) > _LONGEST_NAME:
        name = hashlib.sha256(name).hexdigest()[:32].encode()
    return target.parent / f".{os.fsdecode(name)}.{suffix}"


def _temporary(target: Path, lock: io.FileIO | None) -> Path:
    """A new temporary path for `target`, written into its lock."""
    temporary = _beside(target, f"{secrets.token_hex(8)}.partial")
    if lock is not None:
        lock.seek(0)
        lock.truncate()
        lock.write(os.fsencode(temporary.name))
    return temporary


def _remove_left(target: Path, name: str) -> None:
    """Removes the temporary file of the last holder of a lock, if `name` can be one."""
    pattern = rf"{re.escape(_beside(target, '').name)}[0-9a-f]{{16}}\.partial"
    if re.fullmatch(pattern, name):
        _remove(target.parent / name)


def _remove(path: Path) -> None:
    """Removes a file, a link or a whole directory, as far as that is possible."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        _remove_directory(path)


def _remove_directory(path: Path) -> None:
    """Removes a directory into which threads may still write, as far as that is possible."""
    # Orbax writes in threads, which an interrupted writer does not wait for.
    for _ in range(_ATTEMPTS):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(POLL)


# --- Files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(path: Path, wait: float = 0.0) -> Iterator[Path]:
    """Gives an empty file to fill, which replaces `path` when the block ends without an error.

    After an error the file at `path` is unchanged. A symbolic link stays, and its target is
    replaced.

    Raises `OSError` as the file system does, and as `locked` does.
    """
    path = _destination(path)
    with _partial_file(path, wait) as temporary:
        yield temporary
        os.replace(temporary, path)


@contextlib.contextmanager
def _partial_file(path: Path, wait: float) -> Iterator[Path]:
    with locked(path, wait) as lock:
        temporary = _temporary(path, lock)
        try:
            # Not tempfile: its files are private to the user, and would stay so when renamed.
            temporary.touch(exist_ok=False)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _destination(path: Path) -> Path:
    """The target of a path, there or not; raises `OSError` if it is not a regular file."""
    path = Path(os.path.realpath(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, f"{path.name} is a directory, name a file in it")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"{path.name} is a device, a socket or a pipe")
    return path


def replace_file(path: Path, data: bytes) -> None:
    """Puts `data` at `path`, as `new_file` does; raises what it raises."""
    with new_file(path, PATIENCE) as temporary, open(temporary, "wb") as file:
        file.write(data)


def check_file(path: Path) -> None:
    """Raises `OSError` if `new_file` could not write `path` now; leaves nothing behind."""
    # Trying is the only test that also knows of read-only disks, quotas and root.
    with _partial_file(_destination(path), 0.0):
        pass


# --- Directories --------------------------------------------------------------------------------


@contextlib.contextmanager
def new_directory(directory: Path, size: int = 0, replace: bool = False) -> Iterator[Path]:
    """Gives a directory to fill, which gets its name when the block ends without an error.

    Args:
      directory: must not exist, or be empty.
      size: the least number of bytes that will be written.
      replace: whether an existing directory may be replaced. If the process is killed between the
        two renames that this takes, neither directory is there.

    Raises:
      BusyError: another process is writing it.
      OutputError: it exists, cannot be written, or the disk is full.
    """
    directory = Path(os.path.realpath(directory))  # "." has no name to write beside
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} cannot be created: {error}") from error
    with reporting(f"{directory} could not be written"), locked(directory) as lock:
        _check_vacant(directory, replace)
        workspace = _temporary(directory, lock)
        _check_room(directory, size)
        try:
            made = workspace / "new"
            made.mkdir(parents=True)
            yield made
            if replace and directory.exists():
                directory.rename(workspace / "old")
            made.rename(directory)
        finally:
            _remove_directory(workspace)


def _check_vacant(directory: Path, replace: bool) -> None:
    if os.path.ismount(directory):
        raise OutputError(f"{directory} is a mount point: name a directory in it")
    if not os.path.lexists(directory):
        return
    if not directory.is_dir() or (any(directory.iterdir()) and not replace):
        raise OutputError(f"{directory} exists and is not empty: choose another, or remove it")


def _check_room(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory.parent).free
    if free < size:
        raise OutputError(
            f"{directory} needs {size / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free"
        )


def make_once(target: Path, is_there: Callable[[], bool], make: Callable[[], None]) -> None:
    """Makes a directory that several processes need; one process makes it, the others wait.

    Args:
      make: creates `target` by `new_directory`.
    """
    while not is_there():
        try:
            make()
        except BusyError:
            logger.warning("waiting for another process, which is making %s", target)
            _wait_for(target)
        except OutputError:
            # Another process has made it since.
            if not is_there():
                raise


def _wait_for(target: Path) -> None:
    with contextlib.suppress(OSError), locked(Path(os.path.realpath(target)), math.inf):
        pass


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, and checks that it can be written to.

    Raises:
      OutputError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_file(path / secrets.token_hex(8))
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written to ({error.strerror or first_line(error)}): name another"
        ) from error
