"""Trimming and loudness of recordings."""

import numpy as np

# RMS of a recording relative to full scale; its peak is at most `PEAK`.
LOUDNESS, PEAK = 0.07, 0.98
# A window is silent below this share of the loudest window's RMS (-46 dB).
SILENT = 0.005
# Seconds of a window, and of the silence that is kept at the beginning and at the end.
WINDOW, FRONT, END = 0.01, 0.1, 0.2


def trim(audio: np.ndarray, sample_rate: int) -> tuple[np.ndarray, int]:
    """Trims long silence; returns the recording and the number of samples removed at its beginning.

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
    """Scales a recording to `LOUDNESS`, or as close to it as `PEAK` allows."""
    rms = float(np.sqrt(np.mean(np.square(audio))))
    peak = float(np.max(np.abs(audio), initial=0))
    if not peak:
        return audio
    return audio * np.float32(min(LOUDNESS / rms, PEAK / peak))
