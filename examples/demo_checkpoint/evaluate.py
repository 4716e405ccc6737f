"""Evaluates the speech of a checkpoint: word error rate, voice, and whether it ends without a cut.

    python examples/demo_checkpoint/evaluate.py --checkpoint=demo

The script needs flite, for recordings of the context, and pocketsphinx (`pip install
pocketsphinx`). It prints one measurement a line; --json also writes them as JSON.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from judge import (
    draw_requests,
    largest_difference,
    share_in_voice,
    speak,
    with_other_voice,
    word_error_rate,
)

import csm_jax

CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "as for csm_jax.generate")
STRINGS = flags.DEFINE_integer("strings", 200, "of 3 to 6 digits, half of them for each voice")
CASES = flags.DEFINE_integer("cases", 100, "requests with a context in the other voice")
BATCH = flags.DEFINE_integer("batch", 16, "requests in a batch")
SEED = flags.DEFINE_integer("seed", 1, "seed of the strings and the speech")
JSON = flags.DEFINE_string("json", None, "file to write the measurements to, as JSON")


def evaluate(name: str, strings: int, cases: int, batch: int, seed: int) -> dict[str, float]:
    """Measures a checkpoint; returns the measurements by name."""
    requests = draw_requests(strings, seed)
    model = csm_jax.load(name, dtype="float32")
    start = time.monotonic()
    spoken = speak(model, requests, batch)
    seconds = time.monotonic() - start
    figures = {
        "word error rate": word_error_rate(spoken),
        "word error rate, slt": word_error_rate(spoken[::2]),
        "word error rate, rms": word_error_rate(spoken[1::2]),
        "ended by itself": float(np.mean([each.ended for each in spoken])),
        "in the speaker's own voice": share_in_voice(spoken, [r.speaker for r in requests]),
        "seconds of speech a second": sum(len(each.audio) for each in spoken) / 24_000 / seconds,
    }
    with tempfile.TemporaryDirectory() as directory:
        moved = with_other_voice(draw_requests(cases, seed + 1), Path(directory), seed)
    in_context = speak(model, moved, batch)
    figures["in the voice of the context"] = share_in_voice(
        in_context, [1 - r.speaker for r in moved]
    )
    figures["word error rate after a context"] = word_error_rate(in_context)
    figures["largest difference of streams"] = largest_difference(model, requests[:20])
    for dtype, quantize in (("bfloat16", "none"), ("float32", "int8")):
        narrow = speak(csm_jax.load(name, dtype=dtype, quantize=quantize), requests, batch)
        label = "int8" if quantize == "int8" else dtype
        figures[f"word error rate, {label}"] = word_error_rate(narrow)
    return figures


def main(_: list[str]) -> None:
    figures = evaluate(CHECKPOINT.value, STRINGS.value, CASES.value, BATCH.value, SEED.value)
    for name, value in figures.items():
        print(f"{name:34}{value:10.4f}")
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
