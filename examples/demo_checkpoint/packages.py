"""Files of npm packages and of installed Python packages."""

import importlib.resources
import subprocess
import tarfile
from pathlib import Path

from csm_jax.io.files import new_directory


def npm_package(name: str, directory: Path) -> Path:
    """The directory of an npm package below `directory`; npm downloads it if it is missing."""
    unpacked = directory / name.strip("@").replace("/", "-")
    if not unpacked.exists():
        directory.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", name]
        packed = subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True)
        archive = directory / packed.stdout.strip()
        with new_directory(unpacked) as partial, tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        archive.unlink()
    return unpacked / "package"


def python_file(package: str, name: str) -> bytes:
    """A file of an installed Python package."""
    return (importlib.resources.files(package) / name).read_bytes()
