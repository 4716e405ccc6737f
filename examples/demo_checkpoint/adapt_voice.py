"""Adapts the demo checkpoint to a third voice with LoRA: flite's awb, as speaker 0.

    python examples/demo_checkpoint/adapt_voice.py --out=demo/awb

The script prints the pitch and the word error rate of speaker 0 before and after.
"""

import dataclasses
import json
import random
import time
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from flite import THIRD_VOICE, synthesize_all
from hearing import median_pitch
from judge import draw_requests, speak, word_error_rate
from texts import draw_text

import csm_jax
from csm_jax import finetune

CHECKPOINT = flags.DEFINE_string("base", "demo", "checkpoint to start from")
OUT = flags.DEFINE_string("out", "demo/awb", "directory for the recordings and the run")
RECORDINGS = flags.DEFINE_integer("recordings", 1500, "training recordings")
STEPS = flags.DEFINE_integer("steps", 1500, "training steps")
STRINGS = flags.DEFINE_integer("strings", 40, "strings of digits for the evaluation")


def write_data(directory: Path) -> Path:
    """Writes recordings of the third voice and a manifest of them; returns its path."""
    source = random.Random("third voice")
    texts = [draw_text(source) for _ in range(RECORDINGS.value)]
    paths = [directory / THIRD_VOICE / f"{i:04}.wav" for i in range(len(texts))]
    synthesize_all([(t, THIRD_VOICE, path) for t, path in zip(texts, paths, strict=True)])
    turns = [
        {"speaker": 0, "text": text, "audio": str(path.relative_to(directory))}
        for text, path in zip(texts, paths, strict=True)
    ]
    listed = directory / "train.jsonl"
    listed.write_text("".join(json.dumps([turn]) + "\n" for turn in turns))
    return listed


def measure(adapters: Path | None) -> tuple[float, float]:
    """Returns the median pitch in Hz and the word error rate of speaker 0."""
    model = csm_jax.load(CHECKPOINT.value, dtype="float32", adapters=adapters)
    requests = [dataclasses.replace(each, speaker=0) for each in draw_requests(STRINGS.value, 3)]
    spoken = speak(model, requests, batch=16)
    pitches = [median_pitch(each.audio, model.sample_rate) for each in spoken]
    return float(np.nanmedian(pitches)), word_error_rate(spoken)


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    out = Path(OUT.value)
    data = write_data(out / "speech")
    before = measure(None)
    start = time.monotonic()
    code = finetune.run([
        f"--checkpoint={CHECKPOINT.value}",
        f"--data={data}",
        f"--out={out / 'run'}",
        f"--steps={STEPS.value}",
        "--lora_rank=32",
        # The new voice has other codes, so the head must be trained too.
        "--lora_targets=q,k,v,o,gate,up,down,projection,codebook0_head",
        "--batch_size=8",
        "--learning_rate=2e-3",
        "--depth_share=0.25",
        "--holdout=0.02",
        "--noremat",
    ])  # fmt: skip
    if code:
        raise SystemExit(code)
    seconds = time.monotonic() - start
    after = measure(out / "run" / "adapters")
    print(f"{'':8}{'pitch, Hz':>12}{'word error rate':>18}")
    for name, (pitch, errors) in {"before": before, "after": after}.items():
        print(f"{name:8}{pitch:12.0f}{errors:18.3f}")
    print(f"{STEPS.value} steps in {seconds:.0f} s")


if __name__ == "__main__":
    app.run(main)
