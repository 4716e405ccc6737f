import subprocess

import pytest
from serving import PRESETS, SMALL, serve

import csm_jax
from csm_jax.generator import Generator
from csm_jax.serve.settings import Settings


@pytest.fixture(scope="session")
def model() -> Generator:
    return csm_jax.load("demo", dtype="float32")


@pytest.fixture(scope="session")
def server(model):
    with serve(model, Settings(**SMALL)) as running:
        yield running


@pytest.fixture(autouse=True)
def no_row_is_leaked(request):
    """Whatever a test did, nobody speaks on when it is over."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait_until_idle()


@pytest.fixture(scope="session")
def recording() -> bytes:
    """Somebody's voice, as a flac file."""
    return (PRESETS[0] / "rms.flac").read_bytes()


@pytest.fixture(scope="session")
def transcript() -> str:
    return (PRESETS[0] / "rms.txt").read_text().splitlines()[-1]


@pytest.fixture(scope="session")
def run():
    """Runs a line of a shell, and fails if it fails."""

    def call(line: str) -> str:
        # The lines are literals of tests, as the README has them.
        return subprocess.run(  # noqa: S602
            line,
            shell=True,
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout

    return call
