"""Arrays of samples, as callers and recordings have them: what is speech, and what is refused."""

import numpy as np

from csm_jax.errors import InputError

SAMPLE_RATE = 24_000  # Hz
INT16_SCALE = 32_768
# A recording of speech lasts at least so long, and somewhere is louder than this (-60 dBFS).
_MIN_SECONDS = 0.1
SILENT_PEAK = 1e-3
# Float samples go from -1 to 1; a loud recording may go a little beyond, another scale far.
MAX_PEAK = 2.0


def check_audio(audio: np.ndarray, name: str = "audio") -> np.ndarray:
    """A caller's array as float32 [num_samples]; int16 is scaled by 1 / 32768.

    `name` is what errors call it. Raises `InputError` for another shape or dtype, 0 samples,
    samples that are not finite, or a peak that float samples do not have.
    """
    samples = check_samples(audio, name)
    if not len(samples):
        raise InputError(f"{name}: no samples; give a recording that is not empty")
    return samples


def check_samples(audio: np.ndarray, name: str = "audio") -> np.ndarray:
    """`check_audio` of samples that may be 0 in number."""
    samples = mono_float32(audio, name)
    if (peak := float(np.abs(samples).max(initial=0))) > MAX_PEAK:
        raise InputError(
            f"{name}: a peak of {peak:.3g}, but float samples go from -1 to 1; divide by 32768 "
            "what was 16 bits"
        )
    return samples


def is_silent(samples: np.ndarray) -> bool:
    """Whether float samples [n], n > 0, hold no sound: a constant, or under -60 dBFS."""
    return float(np.ptp(samples)) / 2 < SILENT_PEAK


def check_speech(audio: np.ndarray, name: str) -> np.ndarray:
    """`check_audio` of samples at 24 kHz that are a recording of speech.

    Raises `InputError` also for a recording that is too short or silent.
    """
    samples = check_audio(audio, name)
    seconds = len(samples) / SAMPLE_RATE
    if is_silent(samples):
        swing = float(np.ptp(samples)) / 2
        raise InputError(f"{name}: silent, with a peak of {swing:.2g}; record it louder")
    if seconds < _MIN_SECONDS:
        raise InputError(
            f"{name}: {len(samples)} samples last {seconds:.3g} s, and speech at least "
            f"{_MIN_SECONDS:g} s; record more"
        )
    return samples


def mono_float32(audio: np.ndarray, name: str) -> np.ndarray:
    """Like `check_samples`, with a peak of any size."""
    try:
        audio = np.asarray(audio)
    except ValueError as error:  # such as (rate, samples) of other libraries
        raise InputError(f"{name} is no array of samples: give those alone") from error
    expected = f"give float samples at {SAMPLE_RATE} Hz (load_audio reads files)"
    if audio.ndim != 1:
        raise InputError(f"{name} has shape {audio.shape}; mono audio is [num_samples]: {expected}")
    if np.issubdtype(audio.dtype, np.int16):
        return audio.astype(np.float32) / INT16_SCALE
    if not np.issubdtype(audio.dtype, np.floating):
        raise InputError(f"{name} has dtype {audio.dtype}, not float or int16; {expected}")
    with np.errstate(over="ignore"):  # becomes inf, and is refused as such
        samples = audio.astype(np.float32)
    if bad := np.count_nonzero(~np.isfinite(samples)):
        raise InputError(
            f"{name}: {bad} of {len(samples)} samples are NaN or infinite; repair the recording"
        )
    return samples
