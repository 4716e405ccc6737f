"""What is built and installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("csm_jax", "convert", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])('.')"


def _build(kind: str, source: Path) -> str:
    """Calls a hook of the build backend in a source tree; returns what it says."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}"]
    # Of this variable's effect setuptools warns too.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The wheel and what was said while building it, in the two steps of `python -m build`."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    log = _build("sdist", source)
    (archive,) = source.glob("*.tar.gz")
    shutil.unpack_archive(archive, source, filter="data")
    unpacked = source / archive.name.removesuffix(".tar.gz")
    log += _build("wheel", unpacked)
    (wheel,) = unpacked.glob("*.whl")
    return wheel, log


def test_building_gives_no_warning(built):
    assert "warning" not in built[1].lower()


def test_the_wheel_has_every_file_of_the_package(built):
    with zipfile.ZipFile(built[0]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, package in (("csm_jax", "csm_jax"), ("convert", "csm_jax/convert")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    assert packed == expected
