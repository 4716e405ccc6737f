"""The frames of one part of a text, under the guards: which of them count, and what comes next."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from csm_jax.inference.guard import Action, Guard
from csm_jax.inference.text_guard import TextAction, TextGuard, TextVerdict


class GoBack(NamedTuple):
    """Where the part continues from.

    Attributes:
      num_frames: how many of its frames stay.
      new_seed: whether what follows is drawn with another seed.
      end_bias: of what follows, as for `CSM.generate_frame`.
    """

    num_frames: int
    new_seed: bool
    end_bias: float = 0.0


class Remark(NamedTuple):
    """What a guard did: the kind of a `Notice`, what is wrong, and after how many frames."""

    kind: str
    reason: str
    frame: int


class GuardedStep(NamedTuple):
    """The outcome of new frames.

    Attributes:
      released: int32 [n, Q], frames for the caller, some of them from earlier steps.
      back: where the part has to go back to, if it has to.
      is_over: the part needs no more frames.
      remark: what a guard did, if anything.
    """

    released: np.ndarray
    back: GoBack | None = None
    is_over: bool = False
    remark: Remark | None = None


_REMARKS = {
    TextAction.RESAMPLE: "resampled",
    TextAction.HOLD_END: "continued",
    TextAction.END: "ended",
}


class GuardedFrames:
    """Frames pass the guard that knows the text, if there is one, and then the runaway guard.

    Any chunking of the same frames gives the same decisions.
    """

    def __init__(
        self,
        guard: Guard,
        text_guard: TextGuard | None,
        silent_codes: Collection[int],
        num_codebooks: int,
    ):
        """Starts a part."""
        self._guard = guard
        self._text_guard = text_guard
        self._silent_codes = silent_codes
        # Of the part, without those that were taken back; the first `_passed` have gone to `guard`.
        self._codes = np.zeros((0, num_codebooks), np.int32)
        self._passed = 0

    @property
    def codes(self) -> np.ndarray:
        """All frames that were not taken back, also those that are held: int32 [n, Q]."""
        return self._codes

    def accept(self, codes: np.ndarray, mass: np.ndarray | None) -> GuardedStep:
        """Takes the next frames, without an end of speech.

        Args:
          codes: int32 [n, Q].
          mass: how much each word was attended to, float [n, W]; needed with a text guard.
        """
        if self._text_guard is None or mass is None:
            self._codes = np.concatenate([self._codes, codes])
            return self._pass(len(self._codes))
        released = [codes[:0]]
        for frame, row in zip(codes, mass, strict=True):
            self._codes = np.concatenate([self._codes, frame[None]])
            verdict = self._text_guard.accept(row, int(frame[0]) in self._silent_codes)
            step = self._follow(verdict)
            released.append(step.released)
            if step.back or step.is_over:
                return step._replace(released=np.concatenate(released))
        return GuardedStep(np.concatenate(released))

    def end(self) -> GuardedStep:
        """Takes an end of speech after the frames so far."""
        if self._text_guard is None:
            return self.finish()
        return self._follow(self._text_guard.end())

    def finish(self) -> GuardedStep:
        """Releases what is still held: no more frames come."""
        if self._text_guard is not None and self._text_guard.held_since is not None:
            # What came after an end that was held down has not reached the last word.
            self._codes = self._codes[: self._text_guard.held_since]
        step = self._pass(len(self._codes))
        if step.back or step.is_over:
            return step
        held = self._guard.finish()
        return GuardedStep(np.concatenate([step.released, held]), is_over=True)

    def _follow(self, verdict: TextVerdict) -> GuardedStep:
        """Does what the text guard has decided, unless the runaway guard stops the speech."""
        step = self._pass(verdict.passed)
        if step.back or step.is_over or verdict.action is TextAction.CONTINUE:
            return step
        self._codes = self._codes[: verdict.frame]
        kind = _REMARKS.get(verdict.action)
        remark = Remark(kind, verdict.reason, verdict.frame) if kind and verdict.reason else None
        if verdict.action is TextAction.END:
            last = self.finish()
            return last._replace(
                released=np.concatenate([step.released, last.released]), remark=remark
            )
        back = GoBack(
            verdict.frame,
            new_seed=verdict.action is TextAction.RESAMPLE,
            end_bias=-np.inf if verdict.action is TextAction.HOLD_END else 0.0,
        )
        return step._replace(back=back, remark=remark)

    def _pass(self, num_frames: int) -> GuardedStep:
        """Passes frames on to the runaway guard, up to the first `num_frames`."""
        if num_frames <= self._passed:
            return GuardedStep(self._codes[:0])
        verdict = self._guard.accept(self._codes[self._passed : num_frames])
        self._passed = num_frames
        if verdict.action is Action.CONTINUE:
            return GuardedStep(verdict.released)
        self._passed = verdict.kept
        self._codes = self._codes[: verdict.kept]
        if self._text_guard is not None:
            self._text_guard.truncate(verdict.kept)
        if verdict.action is Action.CUT:
            remark = Remark("guard_cut", verdict.reason, verdict.kept)
            return GuardedStep(verdict.released, is_over=True, remark=remark)
        remark = Remark("resampled", verdict.reason, verdict.kept)
        return GuardedStep(verdict.released, GoBack(verdict.kept, new_seed=True), remark=remark)
