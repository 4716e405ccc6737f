"""What pyright says of the package, and of code that uses it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# What the README's reader has already.
PRELUDE = "import numpy as np\n\nprompt = np.zeros(24_000, np.float32)\n"
MISUSES = {
    "speeker": 'model.generate("hi", speeker=1)',
    "speaker": 'model.generate("hi", speaker="Anna")',
    "temprature": "csm_jax.Sampling(temprature=0.9)",
    "sede": 'engine.submit("hi", sede=1)',
}
SETUP = 'import csm_jax\n\nmodel = csm_jax.load("demo")\nengine = csm_jax.Engine(model)\n'


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict]]:
    """Errors by the name of the file, of one run over the package and over its users."""
    users = tmp_path_factory.mktemp("users")
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    (users / "readme.py").write_text(PRELUDE + "\n".join(blocks))
    (users / "misuse.py").write_text(SETUP + "\n".join(MISUSES.values()) + "\n")
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable]
    command += ["--outputjson", "csm_jax", "convert", str(users)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    errors: dict[str, list[dict]] = {"readme.py": [], "misuse.py": [], "package": []}
    for diagnostic in json.loads(done.stdout)["generalDiagnostics"]:
        if diagnostic["severity"] == "error":
            path = Path(diagnostic["file"])
            errors[path.name if path.parent == users else "package"].append(diagnostic)
    return errors


def _listed(errors: list[dict]) -> str:
    return "\n".join(
        f"{e['file']}:{e['range']['start']['line'] + 1}: {e['message']}" for e in errors
    )


def test_the_package_has_no_type_errors(found):
    assert not found["package"], _listed(found["package"])


def test_the_examples_of_the_readme_have_no_type_errors(found):
    assert not found["readme.py"], _listed(found["readme.py"])


@pytest.mark.parametrize("word", MISUSES)
def test_a_misused_argument_is_a_type_error(found, word):
    line = (SETUP + "\n".join(MISUSES.values())).splitlines().index(MISUSES[word])
    messages = [e["message"] for e in found["misuse.py"] if e["range"]["start"]["line"] == line]
    assert messages
    assert word in " ".join(messages)
