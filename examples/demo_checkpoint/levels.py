"""How a recording begins, ends and how loud it is."""

import numpy as np

# RMS of a recording, full scale being 1; its peak is never more than `PEAK`.
LOUDNESS, PEAK = 0.07, 0.98
# A window is silent if it is this much fainter than the loudest one (46 dB).
SILENT = 0.005
# Seconds: of a window, and of what is left of the silence at the front and at the end.
WINDOW, FRONT, END = 0.01, 0.1, 0.2


def trim(audio: np.ndarray, sample_rate: int) -> tuple[np.ndarray, int]:
    """The recording without long silence around it, and how many samples were cut off the front.

    Args:
      audio: float32 [num_samples].
    """
    size = int(WINDOW * sample_rate)
    windows = audio[: len(audio) // size * size].reshape(-1, size)
    rms = np.sqrt(np.mean(np.square(windows), axis=1))
    loud = np.flatnonzero(rms > SILENT * rms.max(initial=0))
    if not len(loud):
        return audio, 0
    start = max(0, int(loud[0]) * size - int(FRONT * sample_rate))
    end = (int(loud[-1]) + 1) * size + int(END * sample_rate)
    return audio[start:end], start


def level(audio: np.ndarray) -> np.ndarray:
    """The recording at `LOUDNESS`, or as near to it as its peak allows."""
    rms = float(np.sqrt(np.mean(np.square(audio))))
    peak = float(np.max(np.abs(audio), initial=0))
    if not peak:
        return audio
    return audio * np.float32(min(LOUDNESS / rms, PEAK / peak))
