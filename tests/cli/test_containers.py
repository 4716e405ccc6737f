"""Commands as in a container: process 1, an unknown user without a home, read-only caches."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

import csm_jax

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
USER = 54_321
# The namespace of users makes anyone an unknown user without privileges, also root.
CONTAINER = ["unshare", "--user", f"--map-user={USER}", "--pid", "--fork"]


def _has_containers() -> bool:
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run([*CONTAINER, sys.executable, "-c", ""], capture_output=True, check=False)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not _has_containers(), reason="needs namespaces of users")


@pytest.fixture(scope="module")
def first_command() -> list[str]:
    """The first command of the README that speaks."""
    found = re.search(r"^python (-m csm_jax\.generate .*)$", README, re.MULTILINE)
    assert found is not None
    return [sys.executable, *shlex.split(found[1])]


def run_contained(command: list[str], directory: Path, **variables: str):
    """Runs a command in `directory`, with these variables in place of those of homes and caches."""
    unset = {"HOME", "CSM_JAX_CACHE", "XDG_CACHE_HOME", "HF_HOME", "JAX_COMPILATION_CACHE_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [*CONTAINER, *command],
        cwd=directory,
        env=kept | {"TMPDIR": str(directory)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32_768


USUAL = ("demo:", "random:", "speech is not marked as generated:")


def messages(done: subprocess.CompletedProcess) -> list[str]:
    """The lines on standard error that tell of the surroundings."""
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if not line.startswith(USUAL)]


def test_the_first_command_of_the_readme_speaks_without_a_home(tmp_path, first_command):
    """And says the same as the library does; a second run finds the cache of the first."""
    for _ in range(2):
        assert messages(run_contained(first_command, tmp_path)) == [
            f"the user has no home directory: the cache is {tmp_path}/csm-jax-{USER}; "
            "CSM_JAX_CACHE names another"
        ]
    assert sorted(os.listdir(tmp_path)) == [f"csm-jax-{USER}", "digits.wav"]
    assert any((tmp_path / f"csm-jax-{USER}").rglob("*-cache"))
    wanted = csm_jax.load("demo").generate("three one four one five")
    np.testing.assert_allclose(read_wav(tmp_path / "digits.wav"), wanted, atol=2 / 32_768)


def test_the_first_command_of_the_readme_speaks_with_a_read_only_cache(tmp_path, first_command):
    (tmp_path / "locked").mkdir(mode=0o555)
    done = run_contained(first_command, tmp_path, CSM_JAX_CACHE=str(tmp_path / "locked"))
    (line,) = messages(done)
    assert line.startswith(f"the cache of compiled programs in {tmp_path}/locked/xla cannot be ")
    assert len(read_wav(tmp_path / "digits.wav")) > 24_000


SHORT = [sys.executable, "-m", "csm_jax.generate", "--checkpoint=random:tiny", "--text=Hi."]
SHORT += ["--guard=off", "--max_audio_length_ms=80", "--out=a.wav"]


@pytest.mark.long
@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_any_read_only_cache_is_one_line(tmp_path, variable):
    (tmp_path / "locked").mkdir(mode=0o555)
    homes = {"HOME": str(tmp_path), variable: str(tmp_path / "locked")}
    lines = messages(run_contained(SHORT, tmp_path, **homes))
    told = [line for line in lines if line.startswith("the cache of compiled programs in ")]
    assert len(told) == 1
    assert str(tmp_path / "locked") in told[0]
    assert [line for line in lines if line not in told] == [
        line for line in lines if line.startswith("the speech was cut")
    ]
    assert len(read_wav(tmp_path / "a.wav")) == 1920


def test_a_home_that_is_not_there_is_no_traceback(tmp_path):
    """As Debian's `/nonexistent`, which users of services have."""
    (tmp_path / "locked").mkdir(mode=0o555)
    run = run_contained(SHORT, tmp_path, HOME=f"{tmp_path}/locked/none")
    assert any(line.startswith("the cache of compiled programs") for line in messages(run))
    assert len(read_wav(tmp_path / "a.wav")) == 1920
