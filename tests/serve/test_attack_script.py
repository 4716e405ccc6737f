"""`examples/attack.py` attacks servers of this machine only."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "attack.py"
FOREIGN = [
    "http://192.0.2.1:8000",
    "http://0.0.0.0:8000",
    "http://localhost:8000",
    "http://127.0.0.1@192.0.2.1/",
    "http://127.0.0.1.example.org/",
    "https://127.0.0.1:8000",
]


@pytest.mark.parametrize("url", FOREIGN)
def test_the_attack_script_refuses_other_hosts(url):
    done = subprocess.run(
        [sys.executable, SCRIPT, f"--url={url}", "--only=deep_nesting"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert url in done.stderr
