"""Requests that the tests of the engine share, and what they need to run."""

import dataclasses

import numpy as np
from fixtures import CONFIG

from csm_jax import Generator, Request, Sampling, Segment
from csm_jax.inference.config import InferenceConfig

# Texts are split at 12 characters and take no more than 2 s, and few shapes are compiled.
SMALL = InferenceConfig(
    max_part_characters=12, pause_seconds=2.0, seconds_per_letter=0.0, min_bucket=128
)


FRAME = CONFIG.codec.frame_size
GREEDY = Sampling(greedy=True)
# Runs until the test cancels it.
ENDLESS = Request("Hi.", seed=9, max_audio_length_ms=70_000, guard="off")
WAIT_S = 60
LONG_TEXT = "One thing. Or another. No more. And so on. At last."


def sound(num_frames: int) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(num_frames * FRAME)
    return (0.1 * noise).astype(np.float32)


CODES = np.random.default_rng(1).integers(1, 32, (5, CONFIG.num_codebooks)).astype(np.int32)
REQUESTS = {
    "one frame": Request("Hi.", seed=1, max_audio_length_ms=80),
    "short": Request("Hi.", seed=1, max_audio_length_ms=400),
    "another seed": Request("Hi.", seed=2, max_audio_length_ms=960),
    "speaker": Request("Well.", 3, seed=3, max_audio_length_ms=720),
    "greedy": Request("Hi.", sampling=GREEDY, max_audio_length_ms=800),
    "cool": Request("No.", sampling=Sampling(0.5, 5, 0.8, 0.01), max_audio_length_ms=640),
    "penalty": Request(
        "No.", sampling=Sampling(repetition_penalty=1.5, depth_top_k=3), max_audio_length_ms=1600
    ),
    "parts": Request("One thing. Or another. No more.", seed=4),
    "cut in part 2": Request("One thing. Or another. No more.", seed=5, max_audio_length_ms=2800),
    "recording": Request("Hi.", 1, [Segment(0, "Yes?", sound(6))], seed=6, max_audio_length_ms=400),
    "codes": Request("Hi.", 1, [Segment(1, "Yes?", codes=CODES)], seed=7, max_audio_length_ms=480),
}


def first_chunk(ticket) -> np.ndarray:
    return next(iter(ticket))


def with_inference(model: Generator, **values: object) -> Generator:
    """The same model with other constants of inference."""
    return dataclasses.replace(model, inference=dataclasses.replace(model.inference, **values))
