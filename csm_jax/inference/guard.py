"""The runaway guard: speech that loops, falls silent or does not end is stopped as it happens.

It takes codes frame by frame (12.5 a second). A suspicious run is held back from its first frames
on, so that frames that were released are never taken back, and streaming gives the same codes as
offline generation.

Babble that neither repeats nor pauses looks like speech; only its length is a sign.
"""

import dataclasses
from collections.abc import Collection
from enum import Enum
from typing import NamedTuple

import numpy as np

from csm_jax.errors import InputError

REPEATS = "repeats itself"
SILENT = "is silent"
TOO_LONG = "is longer than its text"

# A frame repeats another if codebook 0 and 3/4 of the first 8 are equal: the higher ones are fine
# detail, in which even a loop varies.
_COMPARED_CODEBOOKS = 8
_EQUAL_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class GuardLimits:
    """When speech counts as a runaway. Counts are frames of 80 ms.

    Mimi's acoustic codes hardly ever repeat in natural speech, be it a held vowel, laughter or a
    stutter, because every frame quantizes another stretch of waveform. So a few repeated frames
    are suspicious, and a second or two of them are a fault of the model. Silence can repeat exactly
    and is legitimate up to about 2 s, so it has limits of its own.

    Attributes:
      repeated_frames: repetitions of one frame that are a fault; 1 s.
      loop_frames: frames in a row that are a fault if each repeats the one a period before it, for
        a period of 2 to `longest_period` frames; at least 2 s.
      loop_repeats: repetitions of the whole period that are needed too.
      longest_period: of a loop; 2 s.
      silent_frames: frames of a silence that is a fault; 2.5 s.
      first_silent_frames: the same for the silence before the first word; 4 s.
      repeats_before_holding: repeated frames that are still released, because chance can make them.
      silence_before_holding: frames of a silence that are still released; 0.8 s, so that ordinary
        pauses between sentences are not delayed. Underruns in longer ones are silent too.
      max_retries: how often an utterance is resampled before it is cut.
    """

    repeated_frames: int = 12
    loop_frames: int = 25
    loop_repeats: int = 2
    longest_period: int = 25
    silent_frames: int = 31
    first_silent_frames: int = 50
    repeats_before_holding: int = 3
    silence_before_holding: int = 10
    max_retries: int = 2

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name == "max_retries" else 1
            if value < least or value % 1:
                raise InputError(
                    f"{name} is {value}, but must be a whole number of at least {least}"
                )


class Action(Enum):
    """The next step of the caller."""

    CONTINUE = "continue"
    RESAMPLE = "resample"
    CUT = "cut"


class Verdict(NamedTuple):
    """The guard's decision about a chunk.

    Attributes:
      released: int [n, Q], frames for the caller, some of them from earlier chunks.
      action: RESAMPLE means to go back to `kept` frames and continue with another seed; CUT means
        to end the utterance after `kept` frames.
      reason: what is wrong with the speech, "" with CONTINUE.
      kept: how many frames of the utterance have been released.
    """

    released: np.ndarray
    action: Action
    reason: str
    kept: int


class _Runs(NamedTuple):
    """Runs of the frames so far: index 0 is silence, index p is repetition with period p.

    Attributes:
      recent: int [P, K], the first codebooks of the last P frames, newest first.
      recent_silent: bool [P], which of those are silent.
      counts: int [P + 1], how long each run is.
      missed: bool [P + 1], the last frame was not of the run. One such frame shortens the run by
        one; two in a row end it.
      first: whether the silence, if there is any, is the one at the beginning of the utterance.
    """

    recent: np.ndarray
    recent_silent: np.ndarray
    counts: np.ndarray
    missed: np.ndarray
    first: bool


class Guard:
    """Watches one utterance. Any chunking of the same frames gives the same frames and actions."""

    def __init__(
        self,
        max_frames: int,
        num_codebooks: int,
        silent_codes: Collection[int],
        limits: GuardLimits | None = None,
    ):
        """Starts an utterance.

        Args:
          max_frames: the most that its text can need; the frame after that cuts it.
          silent_codes: the codebook-0 codes of silence.
        """
        self._limits = limits or GuardLimits()
        self._max_frames = max_frames
        self._silent_codes = frozenset(int(code) for code in silent_codes)
        self._repeat_limits = _repeat_limits(self._limits)
        self._runs = self._kept_runs = _no_runs(self._limits.longest_period, num_codebooks)
        self._held = np.zeros((0, num_codebooks), np.int32)
        self._kept = 0
        self._retries = 0

    def accept(self, frames: np.ndarray) -> Verdict:
        """Takes the next frames, int [n, Q], without an end-of-speech frame.

        With RESAMPLE and CUT, what was held and the rest of the chunk are dropped; after RESAMPLE
        the next call brings frame `kept`.
        """
        pending = np.concatenate([self._held, frames])
        num_fit = 0
        for i in range(len(self._held), len(pending)):
            if self._kept + i == self._max_frames:
                return self._stop(pending[:num_fit], TOO_LONG)
            self._runs = _advance(self._runs, pending[i], self._silent_codes)
            if reason := self._fault():
                return self._stop(pending[:num_fit], reason)
            if not self._is_suspicious():
                num_fit = i + 1
                self._kept_runs = self._runs
        self._held = pending[num_fit:]
        return self._release(pending[:num_fit], Action.CONTINUE, "")

    def finish(self) -> np.ndarray:
        """Releases the frames that are still held, int [n, Q]: the speech has ended or is cut."""
        released, self._held = self._held, self._held[:0]
        return self._release(released, Action.CONTINUE, "").released

    def _fault(self) -> str:
        limits, runs = self._limits, self._runs
        if (runs.counts[1:] >= self._repeat_limits).any():
            return REPEATS
        longest = limits.first_silent_frames if runs.first else limits.silent_frames
        return SILENT if runs.counts[0] >= longest else ""

    def _is_suspicious(self) -> bool:
        silence, repeats = self._runs.counts[0], self._runs.counts[1:].max()
        return bool(
            silence > self._limits.silence_before_holding
            or repeats > self._limits.repeats_before_holding
        )

    def _stop(self, released: np.ndarray, reason: str) -> Verdict:
        """Drops all that is not released."""
        self._held, self._runs = released[:0], self._kept_runs
        # Speech that is too long has no onset to go back to.
        if reason == TOO_LONG or self._retries == self._limits.max_retries:
            return self._release(released, Action.CUT, reason)
        self._retries += 1
        return self._release(released, Action.RESAMPLE, reason)

    def _release(self, released: np.ndarray, action: Action, reason: str) -> Verdict:
        self._kept += len(released)
        return Verdict(released, action, reason, self._kept)


def _repeat_limits(limits: GuardLimits) -> np.ndarray:
    """The length of a run, int [P], that is a fault at periods 1 to P."""
    periods = np.arange(1, limits.longest_period + 1)
    lengths = np.maximum(limits.loop_frames, limits.loop_repeats * periods)
    lengths[0] = limits.repeated_frames
    return lengths


def _no_runs(longest_period: int, num_codebooks: int) -> _Runs:
    return _Runs(
        # No code is negative, so nothing repeats what was before the first frame.
        recent=np.full((longest_period, min(num_codebooks, _COMPARED_CODEBOOKS)), -1, np.int32),
        recent_silent=np.zeros(longest_period, bool),
        counts=np.zeros(longest_period + 1, np.int32),
        missed=np.zeros(longest_period + 1, bool),
        first=True,
    )


def _advance(runs: _Runs, frame: np.ndarray, silent_codes: frozenset[int]) -> _Runs:
    """The runs after `frame`, int [Q]."""
    silent = int(frame[0]) in silent_codes
    compared = frame[: runs.recent.shape[1]]
    equal = runs.recent == compared
    repeats = equal[:, 0] & (equal.mean(axis=1) >= _EQUAL_SHARE)
    belongs = np.append(silent, repeats)  # [P + 1]
    # Silence after silence neither makes a loop nor breaks one: a loop can have pauses in it.
    is_pause = np.append(False, runs.recent_silent & silent)
    ended = ~belongs & runs.missed & ~is_pause
    counts = runs.counts + np.where(is_pause, 0, np.where(belongs, 1, -1))
    return _Runs(
        recent=np.concatenate([compared[None], runs.recent[:-1]]),
        recent_silent=np.append(silent, runs.recent_silent[:-1]),
        counts=np.where(ended, 0, np.maximum(counts, 0)),
        missed=np.where(is_pause, runs.missed, ~belongs),
        first=runs.first and not ended[0],
    )
