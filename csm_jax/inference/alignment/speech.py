"""The words of a request's speech while it is generated, part by part.

Axes: F frames, N alignment heads, L text rows, W words.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from csm_jax.checkpoints.alignment_heads import AlignmentHeads
from csm_jax.config import CSMConfig
from csm_jax.inference.alignment.timing import time_words
from csm_jax.inference.alignment.tracking import DELAY, WordTracker
from csm_jax.inference.alignment.words import Word, row_weights, word_spans
from csm_jax.prompt.tokenizer import Tokenizer


class PartAlignment:
    """The words of a part of a text, from the attention of the frames that speak it.

    Attributes:
      tracker: follows the frames, also those that are not released yet.
      texts: the words.
    """

    def __init__(
        self,
        text: str,
        speaker: int,
        tokenizer: Tokenizer,
        heads: AlignmentHeads,
        config: CSMConfig,
        start: int,
    ):
        """Begins a part.

        Args:
          start: frames of the speech before it.
        """
        self.texts = [text[first:last] for first, last in word_spans(text)]
        self.tracker = WordTracker(len(self.texts))
        self._weights = row_weights(text, speaker, tokenizer, config)  # [L, W]
        self._heads = heads
        self._frame_seconds = config.frame_ms / 1000
        self._start = start
        self._num_decided = 0
        self._decided_end = 0.0

    def push(self, attention: np.ndarray) -> np.ndarray:
        """Adds frames: the attention of the heads to the text, float [F, N, at least L].

        Returns:
          The attention to each word, float [F, W].
        """
        mass = attention[..., : len(self._weights)].mean(axis=1) @ self._weights
        self.tracker.push(mass)
        return mass

    def words(self, num_frames: int, audio: np.ndarray | None, sample_rate: int) -> list[Word]:
        """All words with their times in the whole speech.

        Args:
          num_frames: of the part, in the speech.
          audio: float [num_samples], the whole speech; None does not sharpen the times.
        """
        if audio is not None:
            samples = self._frame_seconds * sample_rate
            first, last = self._start * samples, (self._start + num_frames) * samples
            audio = audio[round(first) : round(last)]
        path = self.tracker.path(num_frames, is_over=True)
        mass = self.tracker.mass[:num_frames]
        words = time_words(
            self.texts, path, mass, self._heads, self._frame_seconds, audio, sample_rate
        )
        return [word.moved(self._seconds_before) for word in words]

    def decide(self, num_frames: int, is_over: bool) -> list[Word]:
        """The words whose times have become certain; nothing is taken back later.

        Args:
          num_frames: of the part, released so far.
          is_over: no more of them come.
        """
        if not (is_over or self._may_decide(num_frames)):
            return []
        path = self.tracker.path(num_frames, is_over)
        if not is_over:
            path = path[:-DELAY]
        # A word has ended where another follows it.
        reached = len(self.texts) if is_over else int(path.max(initial=0))
        if reached <= self._num_decided:
            return []
        mass = self.tracker.mass[:num_frames]
        words = time_words(self.texts, path, mass, self._heads, self._frame_seconds)
        new = [self._after_decided(word) for word in words[self._num_decided : reached]]
        self._num_decided = reached
        return [word.moved(self._seconds_before) for word in new]

    def _may_decide(self, num_frames: int) -> bool:
        """Whether another word can have ended, which is quicker to see than the path."""
        return num_frames > DELAY and self.tracker.best_word(num_frames - 1) > self._num_decided

    def _after_decided(self, word: Word) -> Word:
        """A word that begins where those before it have ended, at the earliest."""
        start = max(word.start, self._decided_end)
        end = max(word.end, start)
        self._decided_end = end
        return dataclasses.replace(word, start=start, end=end)

    @property
    def _seconds_before(self) -> float:
        return self._start * self._frame_seconds


class SpeechAlignment:
    """The words of a whole speech."""

    def __init__(self, sample_rate: int):
        """Starts without parts; `sample_rate` is that of its audio."""
        self._sample_rate = sample_rate
        self._parts: list[tuple[PartAlignment, int]] = []

    def add(self, part: PartAlignment, num_frames: int) -> None:
        """Adds a part that is over, and the number of its frames."""
        self._parts.append((part, num_frames))

    def words(self, audio: np.ndarray | None = None) -> list[Word]:
        """The words of the parts so far, in order and without overlaps.

        Args:
          audio: float [num_samples], the whole speech, which sharpens the times.
        """
        return list(self._all_words(audio))

    def _all_words(self, audio: np.ndarray | None) -> Iterator[Word]:
        for part, num_frames in self._parts:
            yield from part.words(num_frames, audio, self._sample_rate)
