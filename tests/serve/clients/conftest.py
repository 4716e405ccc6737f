"""Real clients, each in a process of its own.

Their packages pin versions that clash with those of the tests, and of each other, so they can be in
other environments: CSM_JAX_CLIENTS_PYTHON lists the Pythons to look in, separated by colons
(`pip install csm-jax[clients]` there, and `open-webui`). Packages of npm are in `node_modules` of
this directory (`npm install`).
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PYTHONS = os.environ.get("CSM_JAX_CLIENTS_PYTHON", sys.executable).split(os.pathsep)
SECONDS = 180


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session")
def python():
    """Runs Python code with a package, and returns what it prints as JSON."""

    def run(package: str, code: str, **values: object):
        found = _find_python(package)
        if found is None:
            pytest.skip(f"pip install csm-jax[clients]: there is no {package}")
        given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        return _output([found, "-c", given + textwrap.dedent(code)])

    return run


def _find_python(package: str) -> str | None:
    """The first of the Pythons that has a package."""
    probe = f"import importlib.util as u; raise SystemExit(u.find_spec({package!r}) is None)"
    for each in PYTHONS:
        if subprocess.run([each, "-c", probe], capture_output=True).returncode == 0:
            return each
    return None


@pytest.fixture(scope="session")
def node():
    """Runs a script of this directory with arguments, and returns what it prints as JSON."""
    if not (HERE / "node_modules").is_dir() or not shutil.which("node"):
        pytest.skip(f"npm install --prefix {HERE}")

    def run(script: str, *arguments: str):
        return _output(["node", str(HERE / script), *arguments])

    return run


def _output(command: list[str]):
    environment = os.environ | {"OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
