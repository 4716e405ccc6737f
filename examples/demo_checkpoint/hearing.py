"""Recognition of digits in a recording, and its pitch.

The recognizer is pocketsphinx with the acoustic model of its package and a grammar of any number of
digits.
"""

import functools

import numpy as np
import soxr
from pocketsphinx import Decoder
from texts import DIGITS

RECOGNIZER_RATE = 16_000
# Search range of the pitch in Hz; the flite voices have about 110 and 170.
PITCHES = (60, 350)
GRAMMAR = f"#JSGF V1.0; grammar digits; public <digits> = ({' | '.join(DIGITS)})+;"
SILENCE_SECONDS = 0.2


@functools.cache
def _recognizer() -> Decoder:
    decoder = Decoder(samprate=RECOGNIZER_RATE, lm=None, loglevel="FATAL")
    decoder.add_jsgf_string("digits", GRAMMAR)
    decoder.activate_search("digits")
    return decoder


def recognize_digits(audio: np.ndarray, sample_rate: int) -> list[str]:
    """Returns the digits in float32 [num_samples], as words."""
    silence = np.zeros(int(SILENCE_SECONDS * sample_rate), np.float32)
    padded = np.concatenate([silence, audio, silence])
    resampled = soxr.resample(padded, sample_rate, RECOGNIZER_RATE)
    peak = max(float(np.max(np.abs(resampled))), 1e-3)
    decoder = _recognizer()
    decoder.start_utt()
    decoder.process_raw((resampled / peak * 16_000).astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr.split() if found else []


def transcribe_digits(audio: np.ndarray, sample_rate: int) -> str:
    """`recognize_digits` as a recognizer of csm_jax.evaluate."""
    return " ".join(recognize_digits(audio, sample_rate))


def median_pitch(audio: np.ndarray, sample_rate: int) -> float:
    """Median pitch of the voiced pieces of float32 [num_samples] in Hz; nan if there are none.

    A piece of 40 ms is voiced if it correlates with itself one period later and is not much fainter
    than the loudest piece.
    """
    size, hop = int(0.04 * sample_rate), int(0.01 * sample_rate)
    shortest, longest = sample_rate // PITCHES[1], sample_rate // PITCHES[0]
    starts = range(0, len(audio) - size - longest, hop)
    pieces = [(audio[s : s + size], audio[s : s + size + longest]) for s in starts]
    loudest = max((float(piece @ piece) for piece, _ in pieces), default=0.0)
    pitches = []
    for piece, longer in pieces:
        if piece @ piece < 0.05 * loudest:
            continue
        likeness = _likeness(piece, longer)[shortest : longest + 1]
        # Multiples of the period correlate as well: take the shortest of the good ones.
        best = int(np.argmax(likeness > 0.9 * likeness.max()))
        while best + 1 < len(likeness) and likeness[best + 1] > likeness[best]:
            best += 1
        if likeness[best] > 0.6:
            pitches.append(sample_rate / (shortest + best))
    return float(np.median(pitches)) if pitches else float("nan")


def _likeness(piece: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """Normalized correlation of a piece [N] with `longer`, 0, 1, ... samples later."""
    products = np.correlate(longer, piece, mode="valid")
    squares = np.concatenate([[0.0], np.cumsum(np.square(longer, dtype=np.float64))])
    energies = squares[len(piece) :] - squares[: -len(piece)]
    return products / np.sqrt(np.maximum(energies * energies[0], 1e-12))
