"""Measures the time from the start of a process to its first audio, with compiled programs on disk.

    python examples/second_start.py [--checkpoint=DIR] [--quantize=int8] [--starts=4]

The program starts `csm_jax.generate --stream --out=-` several times and prints a JSON line for
each start: seconds to the first frame of audio, and the resident memory at that time. The first
start compiles. Without --checkpoint, random weights of the full size are written to a temporary
directory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp

import csm_jax
from csm_jax.checkpoints import native_format
from csm_jax.checkpoints.random_weights import random_params
from csm_jax.model.precision import Precision
from csm_jax.prompt.tokenizer import byte_tokenizer

WAV_HEADER_BYTES = 44
FRAME_BYTES = 2 * 1920


def write_random(directory: Path, int8: bool) -> None:
    config = csm_jax.csm_1b()
    bfloat16 = jnp.dtype(jnp.bfloat16)
    params = native_format.flatten(random_params(config, Precision(bfloat16, bfloat16, int8)))
    native_format.save(directory, config, params.items(), byte_tokenizer(config), int8=int8)


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def start(directory: Path, cache: Path) -> dict[str, float]:
    arguments = [f"--checkpoint={directory}", "--stream", "--out=-", "--format=wav"]
    command = [sys.executable, "-m", "csm_jax.generate", *arguments, "--text=Hello from Sesame."]
    started = time.perf_counter()
    environment = os.environ | {"CSM_JAX_CACHE": str(cache)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    audio = process.stdout.read(WAV_HEADER_BYTES + FRAME_BYTES)
    seconds = time.perf_counter() - started
    if len(audio) < WAV_HEADER_BYTES + FRAME_BYTES:
        raise SystemExit("csm_jax.generate ended before its first frame")
    memory = resident_bytes(process.pid)
    process.kill()
    process.wait()
    return {"first_audio_s": round(seconds, 2), "resident_gb": round(memory / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--quantize", default="int8", choices=["none", "int8"])
    parser.add_argument("--starts", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.checkpoint or Path(temporary, "checkpoint")
        if arguments.checkpoint is None:
            write_random(directory, arguments.quantize == "int8")
        for index in range(arguments.starts):
            figures = start(directory, Path(temporary, "cache"))
            print(json.dumps({"start": index + 1, **figures}), flush=True)


if __name__ == "__main__":
    main()
