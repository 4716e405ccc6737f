"""What is built and installed."""

import os
import shutil
import socket
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

pytest.importorskip("setuptools", "77")
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
    """The wheel and the output of its build, in the two steps of `python -m build`."""
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


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """Python in an environment with the wheel and, by their path, the packages it depends on."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory)
    (packages,) = directory.glob("lib/python*/site-packages")
    shutil.unpack_archive(built[0], packages, "zip")
    # Added by name, a folder's own .pth files are not read: the checkout stays out.
    (packages / "dependencies.pth").write_text(str(Path(np.__file__).parents[1]))
    return directory / "bin" / "python"


@pytest.mark.long
def test_the_installed_wheel_speaks(python, tmp_path):
    command = [python, "-m", "csm_jax.generate", "--checkpoint=demo", "--text=one", "--out=one.wav"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples, rate = soundfile.read(tmp_path / "one.wav")
    assert rate == 24_000
    assert np.abs(samples).max() > 0.05


@pytest.mark.long
def test_the_installed_wheel_serves(python, tmp_path):
    """Its page, and speech in a voice that comes with it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "csm_jax.serve", "--checkpoint=demo", f"--port={port}"]
    sizes = ["--max_batch=1", "--max_seq_len=256"]
    server = subprocess.Popen([*command, *sizes], cwd=tmp_path)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            _wait_until_alive(client, server)
            assert "<html" in client.get("/", follow_redirects=True).text
            body = {"model": "csm-1b", "input": "one", "voice": "slt", "response_format": "wav"}
            spoken = client.post("/v1/audio/speech", json=body)
        assert spoken.status_code == 200
        assert spoken.content[:4] == b"RIFF"
        assert len(spoken.content) > 10_000
    finally:
        server.kill()
        server.wait()


def _wait_until_alive(client: httpx.Client, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline
        assert server.poll() is None
        try:
            client.get("/healthz")
            return
        except httpx.TransportError:
            time.sleep(0.1)
