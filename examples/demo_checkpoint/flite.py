"""Speech from flite (Debian package `flite`), whose voices the demo checkpoint learns."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from csm_jax.files import new_file

# Voices by speaker number; a third one is for the codec, and to adapt to.
VOICES = ("slt", "rms")
THIRD_VOICE = "awb"


def synthesise(text: str, voice: str, path: Path) -> Path:
    """Speaks a text into a wav file, 16 kHz. A file that is there is kept."""
    if not path.exists():
        with new_file(path) as partial:
            command = ["flite", "-voice", voice, "-t", text, "-o", str(partial)]
            subprocess.run(command, check=True, capture_output=True)
    return path


def synthesise_all(jobs: list[tuple[str, str, Path]]) -> list[Path]:
    """Many of them, as many at once as there are processors."""
    if shutil.which("flite") is None:
        sys.exit("flite is missing: install it first (apt install flite)")
    for directory in {path.parent for _, _, path in jobs}:
        directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda job: synthesise(*job), jobs))
