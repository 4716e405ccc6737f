"""Measures what a watermark costs: time for a second of audio, and the delay of a stream.

    python examples/watermark_cost.py --seconds=10

The networks have their released sizes and random weights, which cost the same as trained ones.
"CPU" counts the time of all cores; its share is of all cores that the process may use.
"""

import os
import statistics
import sys
import time

import numpy as np
from absl import app, flags

from csm_jax.watermark import Marker, embed
from csm_jax.watermark.checkpoint import random_weights
from csm_jax.watermark.config import WatermarkConfig

SECONDS = flags.DEFINE_float("seconds", 10.0, "seconds of audio")
REPEATS = flags.DEFINE_integer("repeats", 3, "measurements, of which the median is taken")
RATE = 24_000
# Samples of a frame of the codec.
CHUNK = 1920
KEY = (1, 2, 3, 4, 5)


def main(argv: list[str]) -> None:
    del argv
    weights = random_weights(WatermarkConfig())
    audio = 0.1 * np.random.default_rng(0).normal(size=int(SECONDS.value * RATE))
    audio = audio.astype(np.float32)

    def stream() -> None:
        marker = Marker(weights, KEY, RATE)
        for start in range(0, len(audio), CHUNK):
            marker.add(audio[start : start + CHUNK])
        marker.finish()

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}")
    delay = Marker(weights, KEY, RATE).delay
    print(f"delay of a stream: {delay} samples, {delay / RATE:.3f} s of audio")
    for name, run in {"stream": stream, "whole": lambda: embed(audio, RATE, weights, KEY)}.items():
        run()  # compiles
        wall, cpu = zip(*(_measure(run) for _ in range(REPEATS.value)), strict=True)
        per_second = [statistics.median(each) / SECONDS.value for each in (wall, cpu)]
        print(
            f"{name}: {per_second[0]:.3f} s a second of audio, {per_second[1]:.3f} s of CPU: "
            f"{per_second[1] / cores:.1%} of the cores"
        )


def _measure(run) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    app.run(main)
