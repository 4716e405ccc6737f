"""Generates speech with a checkpoint and measures it with a recognizer."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flite import VOICES, synthesize
from hearing import median_pitch, recognize_digits
from texts import draw_digits

import csm_jax
from csm_jax.evaluate.word_errors import count_errors
from csm_jax.inference.generator import Generator
from csm_jax.io.audio import load_audio
from csm_jax.io.samples import SAMPLE_RATE

# Pitch in Hz that separates the two voices: slt has 173, rms 97.
BETWEEN = 130
# Notices of speech that did not end without a cut.
ENDINGS = ("cut", "guard_cut", "resampled", "nothing_said")


@dataclasses.dataclass(frozen=True)
class Spoken:
    """A request and its speech."""

    request: csm_jax.Request
    audio: np.ndarray
    notices: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        return self.request.text.split()

    @property
    def errors(self) -> int:
        return count_errors(self.words, recognize_digits(self.audio, SAMPLE_RATE)).errors

    @property
    def ended(self) -> bool:
        return not set(self.notices) & set(ENDINGS)


def draw_requests(count: int, seed: int) -> list[csm_jax.Request]:
    """Draws held-out strings of 3 to 6 digits, alternating the speakers."""
    source = random.Random(f"strings {seed}")
    texts = [draw_digits(source, 3, 6, held_out=True) for _ in range(count)]
    return [csm_jax.Request(text, speaker=i % 2, seed=i) for i, text in enumerate(texts)]


def with_other_voice(
    requests: Sequence[csm_jax.Request], directory: Path, seed: int
) -> list[csm_jax.Request]:
    """The requests after a turn with the same speaker number in the other speaker's voice."""
    source = random.Random(f"context {seed}")
    moved = []
    for i, request in enumerate(requests):
        text = draw_digits(source, 3, 6, held_out=True)
        voice = VOICES[1 - request.speaker]
        audio = load_audio(synthesize(text, voice, directory / f"{seed}-{i}.wav"), SAMPLE_RATE)
        turn = csm_jax.Segment(request.speaker, text, audio)
        moved.append(dataclasses.replace(request, context=[turn]))
    return moved


def speak(model: Generator, requests: Sequence[csm_jax.Request], batch: int) -> list[Spoken]:
    """Generates all requests, `batch` at a time."""
    notices: list[list[str]] = [[] for _ in requests]
    audio = model.generate_batch(
        requests, batch, notify=lambda i, notice: notices[i].append(notice.kind)
    )
    rows = zip(requests, audio, notices, strict=True)
    return [Spoken(request, samples, tuple(kinds)) for request, samples, kinds in rows]


def word_error_rate(spoken: Sequence[Spoken]) -> float:
    return sum(each.errors for each in spoken) / sum(len(each.words) for each in spoken)


def share_in_voice(spoken: Sequence[Spoken], voices: Sequence[int]) -> float:
    """The share of speech whose pitch is that of its expected voice."""
    pitches = [median_pitch(each.audio, SAMPLE_RATE) for each in spoken]
    right = [
        (pitch > BETWEEN) == (voice == 0) for pitch, voice in zip(pitches, voices, strict=True)
    ]
    return float(np.mean(np.array(right) & np.isfinite(pitches)))


def largest_difference(model: Generator, requests: Sequence[csm_jax.Request]) -> float:
    """The largest difference of a sample between a stream and offline audio."""
    return max(
        float(np.max(np.abs(np.concatenate(list(model.stream(each))) - model.generate(each))))
        for each in requests
    )
