"""What is heard in a recording: digits, by a recogniser nobody here wrote, and the pitch.

The recogniser is pocketsphinx with the acoustic model that its package brings, and a grammar of
any number of digits.
"""

import functools

import numpy as np
import soxr
from pocketsphinx import Decoder
from texts import DIGITS

RECOGNISER_RATE = 16_000
# Hz between which voices are looked for; the flite voices are at about 110 and 170.
PITCHES = (60, 350)
GRAMMAR = f"#JSGF V1.0; grammar digits; public <digits> = ({' | '.join(DIGITS)})+;"
SILENCE_SECONDS = 0.2


@functools.cache
def _recogniser() -> Decoder:
    decoder = Decoder(samprate=RECOGNISER_RATE, lm=None, loglevel="FATAL")
    decoder.add_jsgf_string("digits", GRAMMAR)
    decoder.activate_search("digits")
    return decoder


def recognise_digits(audio: np.ndarray, sample_rate: int) -> list[str]:
    """The digits, as words, in float32 [num_samples]."""
    silence = np.zeros(int(SILENCE_SECONDS * sample_rate), np.float32)
    padded = np.concatenate([silence, audio, silence])
    heard = soxr.resample(padded, sample_rate, RECOGNISER_RATE)
    peak = max(float(np.max(np.abs(heard))), 1e-3)
    decoder = _recogniser()
    decoder.start_utt()
    decoder.process_raw((heard / peak * 16_000).astype(np.int16).tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr.split() if found else []


def median_pitch(audio: np.ndarray, sample_rate: int) -> float:
    """Hz of the voiced parts of float32 [num_samples], by autocorrelation; nan if there are none.

    A piece of 40 ms is voiced if it is like itself one period later, and not much fainter than
    the loudest.
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
        # The shortest period of those that are about as good: twice a period is one too.
        best = int(np.argmax(likeness > 0.9 * likeness.max()))
        while best + 1 < len(likeness) and likeness[best + 1] > likeness[best]:
            best += 1
        if likeness[best] > 0.6:
            pitches.append(sample_rate / (shortest + best))
    return float(np.median(pitches)) if pitches else float("nan")


def _likeness(piece: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """Correlation of a piece [N] with what comes 0, 1, ... samples later."""
    products = np.correlate(longer, piece, mode="valid")
    squares = np.concatenate([[0.0], np.cumsum(np.square(longer, dtype=np.float64))])
    energies = squares[len(piece) :] - squares[: -len(piece)]
    return products / np.sqrt(np.maximum(energies * energies[0], 1e-12))
