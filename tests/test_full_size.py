"""The full size, end to end: a checkpoint written by transformers, converted and run.

    pytest -m full_size -s

takes about 10 minutes, 20 GB of memory and 20 GB of disk, and prints the measurements in
BENCHMARKS.md. It needs torch, transformers and espeak-ng.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.full_size

NUM_FRAMES = 4
CONTEXT_TEXT = "The birch canoe slid on the smooth planks."
TEXT = "Glue the sheet to the dark blue background."


# The kernel also counts the memory of a process before exec; started from this small process, it
# does not include the model of the test.
STARTER = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run([sys.executable, "-m", *sys.argv[1:]], check=True)
seconds = round(time.perf_counter() - started, 1)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}))
"""


def run(*arguments: str) -> dict:
    """Runs a command of this package; returns the kernel's wall time and peak memory of it."""
    command = [sys.executable, "-c", STARTER, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"command": f"python -m {arguments[0]}"} | json.loads(done.stdout)


def speech(path: Path, num_samples: int) -> np.ndarray:
    """A recording of another synthesizer, as float32 at 24 kHz."""
    from csm_jax.io.audio import load_audio, save_audio

    assert shutil.which("espeak-ng"), "install espeak-ng: it speaks the context"
    # Packages install espeak-ng in several places, so the path is looked up.
    subprocess.run(["espeak-ng", "-w", path, CONTEXT_TEXT], check=True)  # noqa: S607
    audio = load_audio(path, 24_000)[:num_samples]
    # Whole frames, since transformers pads a partial frame differently from kyutai and csm_jax.
    save_audio(path, audio[: len(audio) // 1920 * 1920], 24_000)
    return load_audio(path, 24_000)


@pytest.fixture(autouse=True)
def optimized(monkeypatch):
    """Measures programs as users run them."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def reference():
    """The reference models, which do not fit into memory beside csm_jax's: tests drop them."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parent / "reference"))
    import oracles

    return oracles


def test_full_size_codes_equal_transformers(reference, tmp_path, monkeypatch):
    import torch

    from csm_jax import csm_1b
    from csm_jax.checkpoints.native_format import flatten, param_shapes
    from csm_jax.prompt.tokenizer import byte_tokenizer

    monkeypatch.setenv("CSM_JAX_CACHE", str(tmp_path / "cache"))
    config = csm_1b()
    ids = config.text_token_ids
    source, native = tmp_path / "huggingface", tmp_path / "native"
    waveform = speech(tmp_path / "context.wav", 60 * 1920)
    tokenizer = byte_tokenizer(config)
    chat = tokenizer.encode(f"[0]{CONTEXT_TEXT}")
    chat += [ids.audio] * (len(waveform) // 1920) + [ids.audio_eos]
    chat += tokenizer.encode(f"[1]{TEXT}")

    model = reference.hf_model(config, seed=0)
    started = time.perf_counter()
    theirs = reference.hf_greedy_from_audio(
        model, torch.tensor(chat), [torch.tensor(waveform)], NUM_FRAMES
    ).numpy()
    reference_seconds = time.perf_counter() - started
    reference.save_hf(model, source, max_shard_size="3GB", hub_names=True)
    tokenizer.save(source)
    del model

    figures = [run("csm_jax.convert", f"--source={source}", f"--out={native}")]
    arguments = [
        "csm_jax.generate",
        f"--checkpoint={native}",
        f"--text={TEXT}",
        "--speaker=1",
        f"--context_audio={tmp_path / 'context.wav'}",
        f"--context_text={CONTEXT_TEXT}",
        "--context_speaker=0",
        "--greedy",
        "--dtype=float32",
        f"--max_audio_length_ms={NUM_FRAMES * 80}",
        f"--codes_out={tmp_path / 'codes.npy'}",
        f"--out={tmp_path / 'out.wav'}",
    ]
    figures += [run(*arguments) | {"compilation_cache": cache} for cache in ("empty", "filled")]

    shapes = flatten(param_shapes(config))
    finished = sum(4 * int(np.prod(shape.shape)) for shape in shapes.values())
    print()
    for figure in figures:
        print(json.dumps(figure | {"parameter_bytes": finished}))
    print(json.dumps({"transformers_generate_seconds": round(reference_seconds, 1)}))
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), theirs)
    assert (tmp_path / "out.wav").stat().st_size == 44 + NUM_FRAMES * 1920 * 2
    assert figures[0]["peak_rss_bytes"] < finished + 1e9
