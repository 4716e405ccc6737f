"""Files and directories are complete or absent, have one writer, and leave no partial files."""

import ast
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from csm_jax.cli import output
from csm_jax.errors import BusyError, OutputError
from csm_jax.io import audio, files

# A writer that follows the module's description, in a process without this package.
WRITER = """
import fcntl, os, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write(sys.argv[2]); lock.flush()
partial = os.path.join(os.path.dirname(sys.argv[1]), sys.argv[2])
os.makedirs(partial) if sys.argv[3] == "directory" else open(partial, "w").close()
print("writing", flush=True)
time.sleep(100)
"""
PARTIAL = ".out.0123456789abcdef.partial"


@pytest.fixture(params=["file", "directory"])
def kind(request):
    return request.param


@pytest.fixture
def writer(tmp_path, kind):
    """Starts another process that writes `out`."""
    code = [sys.executable, "-S", "-c", WRITER, tmp_path / ".out.lock", PARTIAL, kind]
    with subprocess.Popen(code, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        yield process
        process.kill()


def write(path, kind):
    if kind == "file":
        with files.reporting(str(path)), files.new_file(path) as made:
            made.write_bytes(b"whole")
    else:
        with files.new_directory(path) as made:
            (made / "a").write_bytes(b"whole")


def content(path):
    return (path / "a" if path.is_dir() else path).read_bytes()


def names(directory):
    return sorted(os.listdir(directory))


def test_files_that_another_process_is_writing_are_not_disturbed(tmp_path, kind, writer):
    with pytest.raises(BusyError, match="another process is writing there"):
        write(tmp_path / "out", kind)
    assert names(tmp_path) == [PARTIAL, ".out.lock"]
    assert files.is_locked(tmp_path / "out")


def test_partial_files_of_a_killed_process_are_removed_by_the_next(tmp_path, kind, writer):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not files.is_locked(tmp_path / "out")
    write(tmp_path / "out", kind)
    assert names(tmp_path) == ["out"]
    assert content(tmp_path / "out") == b"whole"


def test_a_short_write_waits_for_the_lock(tmp_path):
    path, order = tmp_path / "out", []
    with files.new_file(path) as made:
        thread = threading.Thread(
            target=lambda: [files.replace_file(path, b"second"), order.append("second")]
        )
        thread.start()
        time.sleep(0.1)
        made.write_bytes(b"first")
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert path.read_bytes() == b"second"
    assert names(tmp_path) == ["out"]


def test_concurrent_writers_leave_the_complete_file_of_one(tmp_path):
    contents = [bytes([i]) * 100_000 for i in range(16)]
    threads = [
        threading.Thread(target=files.replace_file, args=(tmp_path / "out", each))
        for each in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "out").read_bytes() in contents
    assert names(tmp_path) == ["out"]


def test_make_once_runs_once_for_concurrent_callers(tmp_path):
    made = []

    def make():
        with files.new_directory(tmp_path / "out") as directory:
            made.append(1)
            time.sleep(0.2)
            (directory / "a").write_bytes(b"whole")

    def want():
        files.make_once(tmp_path / "out", (tmp_path / "out").is_dir, make)
        assert content(tmp_path / "out") == b"whole"

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert names(tmp_path) == ["out"]


def test_writes_are_complete_on_file_systems_without_locks(tmp_path, kind, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    for name in ("out", "other"):
        write(tmp_path / name, kind)
        assert content(tmp_path / name) == b"whole"
    assert names(tmp_path) == ["other", "out"]
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} is on a file system without locks: let one process at a time write there"
    ]


@pytest.mark.parametrize("name", ["a\nb", 250 * "a", "ä" * 120, " ", ".hidden", "a.partial", "-x"])
def test_unusual_names_can_be_written(tmp_path, name, kind):
    write(tmp_path / name, kind)
    assert names(tmp_path) == [name]


def test_a_name_that_is_too_long_is_an_error_of_one_line(tmp_path, kind):
    with pytest.raises(OutputError, match="File name too long"):
        write(tmp_path / (300 * "a"), kind)
    assert names(tmp_path) == []


@pytest.mark.parametrize("is_there", [True, False])
def test_writing_through_a_symbolic_link_writes_its_target(tmp_path, is_there):
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "out"
    if is_there:
        target.write_bytes(b"old")
    (tmp_path / "link").symlink_to(target)
    write(tmp_path / "link", "file")
    assert (tmp_path / "link").readlink() == target
    assert content(target) == b"whole"
    assert names(tmp_path / "there") == ["out"]


def unusable(directory):
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "nowhere").symlink_to(directory / "gone" / "out")
    os.mkfifo(directory / "pipe")
    (directory / "directory").mkdir()
    (directory / "file").write_bytes(b"")
    (directory / ".linked.lock").symlink_to(directory / "precious")
    (directory / ".taken.lock").mkdir()
    os.mkfifo(directory / ".piped.lock")


UNUSABLE = ["loop", "nowhere", "pipe", "directory", "file/out", "linked", "taken", "piped"]


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_file_path_is_an_error_of_one_line_and_not_changed(tmp_path, name):
    unusable(tmp_path)
    before = names(tmp_path)
    for attempt in (
        lambda: files.check_file(tmp_path / name),
        lambda: write(tmp_path / name, "file"),
    ):
        with pytest.raises(OutputError) as caught, files.reporting(name):
            attempt()
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", ["file", "pipe", "/", "/proc"])
def test_an_unusable_directory_path_is_an_error_of_one_line(tmp_path, name):
    unusable(tmp_path)
    with pytest.raises(OutputError, match=r"exists and is not empty|is a mount point"):
        write(tmp_path / name, "directory")


def vanish(path, kind):
    new = files.new_file if kind == "file" else files.new_directory
    with files.reporting(str(path)), new(path):
        files._remove(path.parent)


def test_a_parent_directory_that_is_deleted_meanwhile_is_an_error_of_one_line(tmp_path, kind):
    (tmp_path / "cache").mkdir()
    with pytest.raises(OutputError, match="No such file or directory"):
        vanish(tmp_path / "cache" / "out", kind)
    assert names(tmp_path) == []


def test_only_partial_files_of_the_same_target_are_removed(tmp_path):
    (tmp_path / "precious").write_bytes(b"mine")
    for name in (
        "precious",
        "../precious",
        ".out.x/../../precious.partial",
        ".other.0.partial",
        "",
    ):
        (tmp_path / ".out.lock").write_text(name)
        write(tmp_path / "out", "file")
    assert names(tmp_path) == ["out", "precious"]


def test_errors_unrelated_to_writing_are_not_converted():
    for error in (KeyError("a"), RuntimeError("Out of memory"), BrokenPipeError(32, "pipe")):
        with pytest.raises(type(error)), files.reporting("out"):
            raise error


def test_an_error_of_a_library_includes_the_system_error():
    text = 'RESOURCE_EXHAUSTED: Error writing "a": No space left on device [source]\nmore'
    with (
        pytest.raises(OutputError, match=r"^out \(No space left on device\): "),
        files.reporting("out"),
    ):
        raise ValueError(text)


@pytest.fixture
def full_disk():
    """A limit of 1000 bytes on file sizes makes real writes fail half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    yield os.strerror(errno.EFBIG)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def stream(path):
    noise = np.random.default_rng(0).uniform(-1, 1, 24_000).astype(np.float32)
    with audio.open_audio(path, 24_000) as write_on:
        for _ in range(3):
            write_on(noise)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus", ".pcm"])
def test_a_stream_to_a_full_disk_is_an_error_of_one_line_and_leaves_no_file(
    tmp_path, suffix, full_disk
):
    with pytest.raises(OutputError, match=full_disk):
        stream(tmp_path / f"a{suffix}")
    assert names(tmp_path) == []


def test_codes_to_a_full_disk_are_an_error_of_one_line(tmp_path, full_disk):
    with pytest.raises(OutputError, match=full_disk):
        output.save_codes(tmp_path / "a.npy", np.zeros((100, 32), np.int32))
    assert names(tmp_path) == []


# --- One way to write ---------------------------------------------------------------------------

RENAMES = {"os.rename", "os.renames", "os.replace", "shutil.move"}


def renaming_calls(path: Path) -> list[str]:
    """The calls of a module that rename files."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    return [name for name in names if name in RENAMES or name.endswith(".rename")]


def test_only_the_module_of_atomic_files_renames():
    root = Path(__file__).parents[2]
    modules = [path for folder in ("csm_jax", "convert") for path in (root / folder).rglob("*.py")]
    renaming = [path.name for path in modules if renaming_calls(path)]
    assert renaming == ["files.py"]
