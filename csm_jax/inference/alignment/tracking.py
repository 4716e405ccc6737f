"""Which word is being spoken at each frame: a monotonic path through the attention.

The path visits the words in their order. A word can be left out, and words at both ends can be
missing, each at a price; so a text that is cut, or a word that is skipped, is found.

Axes: T frames, W words.
"""

from typing import NamedTuple

import numpy as np

# Attention below this says nothing about a word; frames that attend to no word decide nothing.
_FLOOR = 0.02
# The price of a word that is left out: less than a frame that does not attend to it at all costs.
_SKIP = 3.0
# Frames after the one that is decided which a stream waits for, and which a boundary is averaged
# over, on each side.
DELAY = 3


class _Column(NamedTuple):
    """One frame: its attention, the best scores of paths that end at each word, and where from."""

    mass: np.ndarray  # float [W]
    scores: np.ndarray  # float [W]
    before: np.ndarray  # int [W], the word of the frame before


class WordTracker:
    """Follows the speech of a text, frame by frame. Any chunking of the frames gives the same."""

    def __init__(self, num_words: int):
        """Starts before the first frame of a text with at least one word."""
        self.num_words = num_words
        self._columns: list[_Column] = []

    def __len__(self) -> int:
        """Frames so far."""
        return len(self._columns)

    def push(self, mass: np.ndarray) -> None:
        """Adds frames: how much the model attended to each word when it sampled them, [n, W]."""
        for row in mass:
            self._columns.append(self._next(row))

    def truncate(self, num_frames: int) -> None:
        """Goes back to the first frames."""
        del self._columns[num_frames:]

    @property
    def mass(self) -> np.ndarray:
        """The attention of all frames, float [T, W]."""
        rows = [column.mass for column in self._columns]
        return np.stack(rows) if rows else np.zeros((0, self.num_words))

    def best_word(self, frame: int) -> int:
        """The word of a frame on the best path that ends there."""
        return int(np.argmax(self._columns[frame].scores))

    def path(self, num_frames: int, is_over: bool) -> np.ndarray:
        """The word of each of the first frames on the best path through them, int [num_frames].

        Args:
          is_over: no more frames come, so that words after the last one are missing.
        """
        columns = self._columns[:num_frames]
        if not columns:
            return np.zeros(0, int)
        scores = columns[-1].scores
        if is_over:
            scores = scores - _SKIP * np.arange(self.num_words)[::-1]
        words = [int(np.argmax(scores))]
        for column in columns[:0:-1]:
            words.append(int(column.before[words[-1]]))
        return np.array(words[::-1])

    def _next(self, mass: np.ndarray) -> _Column:
        evidence = np.log(mass + _FLOOR)
        skipped = _SKIP * np.arange(self.num_words)
        if not self._columns:
            return _Column(mass, evidence - skipped, np.zeros(self.num_words, int))
        scores = self._columns[-1].scores
        words = np.arange(self.num_words)
        # To word w from the best word before it: the price is that of the words between.
        priced = scores + skipped
        best = np.maximum.accumulate(priced)
        origin = np.maximum.accumulate(np.where(priced == best, words, 0))
        moved = np.append(-np.inf, best[:-1] - skipped[1:] + _SKIP)
        stays = scores >= moved
        before = np.where(stays, words, np.append(0, origin[:-1]))
        return _Column(mass, np.where(stays, scores, moved) + evidence, before)


def boundary(mass: np.ndarray, path: np.ndarray, word: int) -> float:
    """When the attention moves to a word, in frames, with fractions.

    Where it moves within a few frames, its share before and after tells the place between them.

    Args:
      mass: float [at least T, W].
      path: int [T], of which at least one frame has the word.
    """
    first = int(np.argmax(path >= word))
    if first == 0:
        return 0.0
    window = slice(max(0, first - DELAY), first + DELAY)
    before = mass[window, :word].sum(axis=1) + _FLOOR
    after = mass[window, word:].sum(axis=1) + _FLOOR
    return window.start + float(np.sum(before / (before + after)))
