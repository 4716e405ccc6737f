"""Judges whose opinions are known."""

import numpy as np


def recognize(audio: np.ndarray, sample_rate: int) -> str:
    assert sample_rate == 24_000
    assert audio.dtype == np.float32
    return "One, two -- two!"


def embed(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """The direction of the prompts in the tests, which are louder than the takes, is (1, 0)."""
    return np.array([1.0, 0.0]) if len(audio) == 12_000 else np.array([3.0, 4.0])


def score(audio: np.ndarray, sample_rate: int) -> float:
    return len(audio) / sample_rate
