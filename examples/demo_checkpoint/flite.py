"""Speech from flite (Debian package `flite`), the training data of the demo checkpoint."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from csm_jax.io.files import new_file

# Voices by speaker number; the third one is for the codec and for `adapt_voice.py`.
VOICES = ("slt", "rms")
THIRD_VOICE = "awb"


def synthesize(text: str, voice: str, path: Path) -> Path:
    """Synthesizes a text to a 16 kHz wav file, unless the file exists."""
    if not path.exists():
        with new_file(path) as partial:
            command = ["flite", "-voice", voice, "-t", text, "-o", str(partial)]
            subprocess.run(command, check=True, capture_output=True)
    return path


def synthesize_all(jobs: list[tuple[str, str, Path]]) -> list[Path]:
    """Synthesizes many texts, as many at once as there are processors."""
    if shutil.which("flite") is None:
        sys.exit("flite is missing: install it first (apt install flite)")
    for directory in {path.parent for _, _, path in jobs}:
        directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda job: synthesize(*job), jobs))
