"""Recordings of flite with the times of their words, which flite prints."""

import random
import subprocess
import tempfile
from pathlib import Path

from flite import VOICES
from texts import DIGITS, draw_digits

from csm_jax.align.recordings import Recording
from csm_jax.io.audio import load_audio
from csm_jax.io.samples import SAMPLE_RATE

# Sounds of the digits as flite pronounces them; the first vowels of some vary.
NUM_SOUNDS = dict(zip(DIGITS, (4, 3, 2, 3, 3, 3, 4, 5, 2, 3), strict=True))


def synthesize_with_times(text: str, voice: str, path: Path) -> list[float]:
    """Speaks a text of digits with flite; returns when its words start, in seconds."""
    command = ["flite", "-voice", voice, "-psdur", "-t", text, "-o", str(path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sounds = [sound.rsplit(":", 1) for sound in printed.split()]
    ends = [0.0, *(float(end) for _, end in sounds)]
    starts, index = [], 0
    for word in text.split():
        while sounds[index][0] == "pau":
            index += 1
        starts.append(ends[index])
        index += NUM_SOUNDS[word]
    return starts


def record(count: int, seed: int) -> list[Recording]:
    """Draws texts and records them, in the two voices in turn."""
    source = random.Random(f"alignment {seed}")
    recordings = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "speech.wav"
        for index in range(count):
            text = draw_digits(source, 3, 6, held_out=True)  # in words, not in numerals
            starts = synthesize_with_times(text, VOICES[index % 2], path)
            recordings.append(Recording(text, load_audio(path, SAMPLE_RATE), index % 2, starts))
    return recordings
