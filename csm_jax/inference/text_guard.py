"""The guard that knows the text: no end before the last word, and no word left out or repeated.

It sees which word the model attends to at each frame. Where that looks wrong it holds frames back,
so that a stream never takes anything back, until it is sure; any chunking of the frames gives the
same decisions. Frames are 80 ms.
"""

import dataclasses
import math
import unicodedata
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np

from csm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextGuardLimits:
    """When speech counts as not following its text.

    Attributes:
      attended: the attention that a word has while it is spoken.
      missed: a word that never got more attention than this was left out.
      skip_frames: frames on a later word after which words between are counted as left out.
      repeat_frames: frames on an earlier word after which it is counted as said again.
      last_frames, last_per_letter: frames that the last word takes: so many, and so many for each
        of its letters. Six tenths of them are needed before the end of speech, or a third if the
        speech is silent by then; after as many again, or after a pause, it is ended.
      pause_frames: silent frames in a row that are a pause; a stop consonant has fewer.
      left_frames: frames in a row that hardly attend to the last word, after which it is over.
      faded, faded_frames: after a silent frame late in the last word, so many frames with less
        attention than this end the speech at that frame, unless as many in a row get more.
      hold_frames: frames for which the end of speech is held down, and as many more as the missing
        words take at `last_per_letter`.
      max_retries: how often a part is resampled before it is left as it is.
    """

    attended: float = 0.4
    missed: float = 0.1
    skip_frames: int = 3
    repeat_frames: int = 5
    last_frames: int = 6
    last_per_letter: float = 1.2
    pause_frames: int = 2
    left_frames: int = 3
    faded: float = 0.7
    faded_frames: int = 4
    hold_frames: int = 25
    max_retries: int = 2

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}, but must be at least 0")


class TextAction(Enum):
    """What is to be done after a frame."""

    CONTINUE = "continue"
    RESAMPLE = "resample"  # go back to `frame`, with another seed
    HOLD_END = "hold end"  # go back to `frame`, and hold the end of speech down
    RELEASE_END = "release end"  # go back to `frame`, without that
    END = "end"  # the speech has ended after `frame` frames


class TextVerdict(NamedTuple):
    """The decision after a frame.

    Attributes:
      action, frame: what to do, and the number of frames that it leaves.
      passed: frames, counted from the first, that nothing is wrong with.
      reason: what is wrong, "" if nothing is.
    """

    action: TextAction
    frame: int
    passed: int
    reason: str = ""


class _State(NamedTuple):
    """What is known after a frame.

    Attributes:
      seen: the most attention that each word has got, float [W].
      current: the word that was reached.
      reached_last: the frame at which the last word was reached; None before.
      left_since: the first of the last frames that hardly attend to the last word.
      wrong: the kind of a suspicious run of frames, "" if there is none.
      wrong_since, wrong_frames: its first frame, and how many of its frames attend to a word.
    """

    seen: np.ndarray
    current: int
    reached_last: int | None
    left_since: int
    wrong: str
    wrong_since: int
    wrong_frames: int


# The part of the last word's natural length after which a silent frame is late in it.
_LATE = 0.4
# The parts of it that are needed before the end of speech: in general, and where it is silent.
_SPOKEN = 0.6
_SPOKEN_SILENT = 1 / 3

SKIPPED = "leaves out words"
REPEATED = "says words again"
OVERRUN = "goes on after its last word"
EARLY = "ends before its last word"
MISSING = "lacks its last words"


class TextGuard:
    """Watches one part of a text.

    Attributes:
      held_since: the frames before an end of speech that is held down; None if none is.
    """

    def __init__(self, words: Sequence[str], limits: TextGuardLimits | None = None):
        """Starts before the first frame.

        Args:
          words: of the part; at least one.
        """
        self._limits = limits or TextGuardLimits()
        self._letters = np.array([sum(map(str.isalnum, word)) for word in words])
        # Symbols and emoji may be passed over.
        self._last = max((i for i, word in enumerate(words) if _is_said(word)), default=0)
        self._states = [_State(np.zeros(len(words)), -1, None, 0, "", 0, 0)]
        self._silent: list[bool] = []
        self._on_last: list[float] = []  # the attention of each frame to the last word
        self._retries = 0
        self.held_since: int | None = None
        self._gave_up = False

    @property
    def num_frames(self) -> int:
        """Frames so far."""
        return len(self._silent)

    def truncate(self, num_frames: int) -> None:
        """Goes back to the first frames, after which the end of speech is not held down."""
        self.held_since = None
        del self._states[num_frames + 1 :], self._silent[num_frames:], self._on_last[num_frames:]

    def accept(self, mass: np.ndarray, is_silent: bool) -> TextVerdict:
        """Takes the next frame: its attention to each word, float [W], and whether it is silent."""
        frame = self.num_frames
        self._states.append(self._next(self._states[-1], mass, frame))
        self._silent.append(is_silent)
        self._on_last.append(float(mass[self._last]))
        state = self._states[-1]
        if self.held_since is not None:
            return self._while_held(self.held_since, state, frame)
        if state.wrong and state.wrong_frames >= self._allowed(state.wrong):
            return self._fault(state, frame)
        if state.reached_last is None:
            return self._continue(state.wrong_since if state.wrong else frame + 1)
        return self._after_last(state, state.reached_last, frame)

    def end(self) -> TextVerdict:
        """Decides about an end of speech after the frames so far."""
        state, count = self._states[-1], self.num_frames
        if state.wrong == SKIPPED and self._retries < self._limits.max_retries:
            return self._resample(state)
        if self._gave_up or self._may_end(state):
            return TextVerdict(TextAction.END, count, count)
        self.held_since = count
        return TextVerdict(TextAction.HOLD_END, count, self._passed_before(count), EARLY)

    def _next(self, before: _State, mass: np.ndarray, frame: int) -> _State:
        limits = self._limits
        seen = np.maximum(before.seen, mass)
        word = int(np.argmax(mass))
        reached = before.reached_last
        if reached is None and seen[self._last] >= limits.attended:
            reached = frame
        left_since = frame + 1 if mass[self._last] >= limits.missed else before.left_since
        state = before._replace(seen=seen, reached_last=reached, left_since=left_since)
        if mass[word] < limits.attended:
            return state
        if self._gave_up:
            return state._replace(current=max(before.current, word))
        between = seen[before.current + 1 : word]
        if word < before.current:
            return _suspect(state, REPEATED, frame)
        if (between < limits.missed).any():
            return _suspect(state, SKIPPED, frame)
        return state._replace(current=word, wrong="", wrong_frames=0)

    def _allowed(self, wrong: str) -> int:
        return self._limits.skip_frames if wrong == SKIPPED else self._limits.repeat_frames

    def _fault(self, state: _State, frame: int) -> TextVerdict:
        since = state.wrong_since
        if state.wrong == REPEATED and state.reached_last is not None:
            return TextVerdict(TextAction.END, since, since, OVERRUN)
        if self._retries == self._limits.max_retries:
            self._gave_up = True
            self._states[-1] = state._replace(wrong="")
            return self._continue(frame + 1)
        return self._resample(state)

    def _resample(self, state: _State) -> TextVerdict:
        self._retries += 1
        self.truncate(state.wrong_since)
        return TextVerdict(TextAction.RESAMPLE, state.wrong_since, state.wrong_since, state.wrong)

    def _after_last(self, state: _State, reached: int, frame: int) -> TextVerdict:
        """Decides once the last word is being spoken: it ends, or is ended, soon."""
        natural = reached + self._natural_frames
        pause = self._first_pause(reached)
        left = max(state.left_since, reached + self._natural_frames // 2)
        faded, num_faded = self._faded(reached)
        if self._last == 0:
            left = faded = frame + 1  # the first word of a text gets little attention at any time
        elif num_faded >= self._limits.faded_frames:
            return TextVerdict(TextAction.END, faded, faded, OVERRUN)
        if frame + 1 - left >= self._limits.left_frames:
            end = left if pause is None else min(left, pause)
            return TextVerdict(TextAction.END, end, end, OVERRUN)
        if pause is not None and frame >= pause + 1 and not any(self._silent[pause + 1 :]):
            return TextVerdict(TextAction.END, pause, pause, OVERRUN)
        if frame >= natural + self._natural_frames:
            end = natural if pause is None else pause
            return TextVerdict(TextAction.END, end, end, OVERRUN)
        wrong_since = state.wrong_since if state.wrong else frame + 1
        end = natural if pause is None else pause
        return self._continue(min(end, left, faded, wrong_since, frame + 1))

    def _while_held(self, since: int, state: _State, frame: int) -> TextVerdict:
        """Decides while the end of speech is held down, since `since` frames."""
        if self._may_end(state):
            self.held_since = None
            if state.wrong == SKIPPED and self._retries < self._limits.max_retries:
                return self._resample(state)
            # All of it is released, so nothing can be wrong with it any more.
            self._states[-1] = state._replace(wrong="")
            return TextVerdict(TextAction.RELEASE_END, frame + 1, frame + 1)
        missing = self._letters[state.current + 1 : self._last + 1].sum()
        limits = self._limits
        if frame - since >= limits.hold_frames + math.ceil(limits.last_per_letter * missing):
            return self._lacking(since)
        return self._continue(self._passed_before(since))

    def _lacking(self, since: int) -> TextVerdict:
        """Decides after a hold in which the last word was not spoken."""
        if self._retries == self._limits.max_retries:
            return TextVerdict(TextAction.END, since, since, MISSING)
        self._retries += 1
        passed = self._passed_before(since)
        self.truncate(passed)
        return TextVerdict(TextAction.RESAMPLE, passed, passed, MISSING)

    def _may_end(self, state: _State) -> bool:
        """Whether the last word has been spoken, so far as the attention and the sound tell."""
        if state.reached_last is None:
            return False
        elapsed = self.num_frames - state.reached_last
        needed = _SPOKEN_SILENT if self._silent[-1] else _SPOKEN
        return elapsed >= needed * self._natural_frames

    @property
    def _natural_frames(self) -> int:
        """Frames that the last word takes, at most as a rule."""
        limits = self._limits
        return limits.last_frames + math.ceil(limits.last_per_letter * self._letters[self._last])

    def _passed_before(self, frame: int) -> int:
        state = self._states[frame]
        return state.wrong_since if state.wrong else frame

    def _first_pause(self, reached: int) -> int | None:
        """Where the first pause after the last word ends, in frames."""
        count = self._limits.pause_frames
        for end in range(reached + 2 * count, self.num_frames + 1):
            # One frame of three may be missed: not all that is quiet has a silent code.
            if self._silent[end - 1] and sum(self._silent[end - count - 1 : end]) >= count:
                return end
        return None

    def _faded(self, reached: int) -> tuple[int, int]:
        """Where a silent frame late in the last word ends, and how many faded frames follow it.

        A stop consonant is silent too, but the attention stays on its word.
        """
        limits, end, num_faded, num_strong = self._limits, self.num_frames, 0, 0
        late = reached + math.ceil(_LATE * self._natural_frames)
        for frame in range(late, self.num_frames):
            is_faded = self._on_last[frame] < limits.faded
            num_strong = 0 if is_faded else num_strong + 1
            if end == self.num_frames or num_strong >= limits.faded_frames:
                end, num_faded, num_strong = self.num_frames, 0, 0
            elif is_faded:
                num_faded += 1
            if self._silent[frame] and not num_faded:
                end, num_strong = frame + 1, 0
            if num_faded >= limits.faded_frames:
                break
        return end, num_faded

    def _continue(self, passed: int) -> TextVerdict:
        return TextVerdict(TextAction.CONTINUE, self.num_frames, passed)


def _suspect(state: _State, wrong: str, frame: int) -> _State:
    """Adds a frame to the suspicious run, or begins one."""
    if state.wrong == wrong:
        return state._replace(wrong_frames=state.wrong_frames + 1)
    return state._replace(wrong=wrong, wrong_since=frame, wrong_frames=1)


def _is_said(word: str) -> bool:
    return any(unicodedata.category(character)[0] in "LN" for character in word)
