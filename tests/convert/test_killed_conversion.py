"""Conversions that are killed or stopped: no half checkpoint, and the next one succeeds."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from fixtures import CONVERT, assert_same_params, loaded, one_error, params

from csm_jax.checkpoints import native_format
from csm_jax.convert import __main__ as convert

KILLED = """
    import os, signal, sys, time
    from csm_jax.checkpoints import native_format
    from csm_jax.convert import __main__ as convert
    from csm_jax.convert import layouts
    from csm_jax.prompt.tokenizer import BPETokenizer

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_at(pairs, count):
        for number, pair in enumerate(pairs):
            kill() if number == count else None
            yield pair

    real = layouts.convert
    if sys.argv[1] == "paused":
        kill = lambda: time.sleep(100)
    if sys.argv[1] in ("reading", "paused"):
        layouts.convert = lambda *arguments: killed_at(real(*arguments), 20)
    else:
        BPETokenizer.save = kill
    sys.exit(convert.run(sys.argv[2:]))
"""


def assert_recovers(source: Path, out: Path) -> None:
    """Checks that no checkpoint is left, and that the next run cleans up and succeeds."""
    partial, lock = sorted(out.parent.iterdir())
    assert re.fullmatch(r"\.out\.[0-9a-f]{16}\.partial", partial.name)
    assert lock.name == ".out.lock"
    assert not out.exists()
    assert not native_format.is_native(out)
    assert not native_format.is_native(partial)
    assert convert.run([f"--source={source}", f"--out={out}"]) == 0
    assert list(out.parent.iterdir()) == [out]
    assert_same_params(loaded(out), params())


@pytest.mark.parametrize("moment", ["reading", "almost done"])
def test_a_killed_conversion_leaves_no_checkpoint_and_can_be_repeated(
    huggingface, tmp_path, moment
):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    code = [sys.executable, "-c", textwrap.dedent(KILLED), moment, *flags]
    assert subprocess.run(code).returncode == -signal.SIGKILL
    if moment == "almost done":
        assert any(path.name == "params" for path in out.parent.glob("*/new/*"))
    assert_recovers(huggingface, out)


def test_a_conversion_ended_by_sigkill_leaves_no_checkpoint_and_can_be_repeated(
    huggingface, tmp_path
):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    process = subprocess.Popen([*CONVERT, *flags])
    while not list(out.parent.glob(".out.*.partial")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert_recovers(huggingface, out)


def in_namespace(*flags: str) -> subprocess.Popen:
    """Starts a conversion as process 1, as in a container; it ends with the returned process."""
    unshare = [shutil.which("unshare") or "true", "--pid", "--fork", "--kill-child"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE
    )
    if done.stdout != b"1\n":
        pytest.skip("process namespaces need rights that this user does not have")
    return subprocess.Popen([*unshare, *CONVERT, *flags], stderr=subprocess.PIPE)


def wait_for_partial(out: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(".out.*.partial/new/params/*")):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_conversion_killed_as_process_1_can_be_repeated(huggingface, tmp_path):
    """The repeated conversion has the same process id."""
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    process = in_namespace(*flags)
    wait_for_partial(out, process)
    process.kill()
    process.wait()
    again = in_namespace(*flags)
    assert again.communicate() == (None, b"")
    assert again.returncode == 0
    assert list(out.parent.iterdir()) == [out]
    assert_same_params(loaded(out), params())


def test_a_running_conversion_of_another_namespace_is_not_disturbed(huggingface, tmp_path, capsys):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    process = in_namespace(*flags)
    wait_for_partial(out, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGSTOP)
    assert convert.run(flags) == 2
    assert "could not be written (another process is writing there)" in one_error(capsys)
    assert convert.run([f"--verify={out}"]) == 2
    assert "is being written by another process" in one_error(capsys)
    os.kill(int(children[0]), signal.SIGCONT)
    assert process.communicate() == (None, b"")
    assert process.returncode == 0
    assert list(out.parent.iterdir()) == [out]
    assert_same_params(loaded(out), params())


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_ended_by_a_signal_leaves_no_files(huggingface, tmp_path, number):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    code = [sys.executable, "-c", textwrap.dedent(KILLED), "paused", *flags]
    process = subprocess.Popen(code, stderr=subprocess.PIPE)
    wait_for_partial(out, process)
    process.send_signal(number)
    assert process.communicate() == (None, b"")
    assert process.returncode == -number
    assert list(out.parent.iterdir()) == []


@pytest.mark.long
def test_a_conversion_killed_at_any_moment_can_be_repeated(huggingface, tmp_path):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    random = np.random.default_rng(0)
    for _ in range(10):
        process = subprocess.Popen([*CONVERT, *flags])
        while not out.parent.exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.wait()
        assert convert.run([f"--verify={out}"]) == (0 if out.exists() else 2)
        if out.exists():
            assert_same_params(loaded(out), params())
            shutil.rmtree(out)
    assert convert.run(flags) == 0
    assert list(out.parent.iterdir()) == [out]
    assert_same_params(loaded(out), params())
