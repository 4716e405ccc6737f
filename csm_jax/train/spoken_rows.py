"""Which rows of text are spoken in each frame of a recording: the targets of guided attention.

Axes: F frames of a turn, L rows of its text, W words.
"""

from collections.abc import Sequence

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.inference.alignment.words import row_weights
from csm_jax.prompt.tokenizer import Tokenizer
from csm_jax.train.data import RecordedTurn
from csm_jax.train.word_times import TimedWord


def spoken_rows(
    turn: RecordedTurn,
    num_frames: int,
    config: CSMConfig,
    tokenizer: Tokenizer,
    *,
    diagonal: float,
) -> np.ndarray:
    """The rows of a turn's text that are spoken in each of its frames.

    Args:
      diagonal: share of the text, on both sides of the place that a frame would have in even
        speech, that is taken for spoken where the turn has no word times; 0 takes nothing.

    Returns:
      int32 [F, 2]: the first row and the one after the last; equal where none is known.
    """
    of_word = row_weights(turn.text, turn.speaker, tokenizer, config) > 0  # [L, W]
    if turn.words is not None:
        return _timed_rows(of_word, turn.words, num_frames, config.frame_ms / 1000)
    if diagonal > 0:
        return _diagonal_rows(of_word, num_frames, diagonal)
    return np.zeros((num_frames, 2), np.int32)


def _timed_rows(
    of_word: np.ndarray, words: Sequence[TimedWord], num_frames: int, frame_seconds: float
) -> np.ndarray:
    """The rows of all words of which a part is spoken in the frame."""
    first = of_word.argmax(axis=0)  # [W]
    last = len(of_word) - of_word[::-1].argmax(axis=0)
    starts, ends = (np.array([getattr(word, name) for word in words]) for name in ("start", "end"))
    edges = frame_seconds * np.arange(num_frames + 1)
    spoken = (starts < edges[1:, None]) & (ends > edges[:-1, None])  # [F, W]
    # A word without a duration is not spoken; one that the tokenizer drops has no rows.
    spoken &= (ends > starts) & of_word.any(axis=0)
    lowest = np.where(spoken, first, len(of_word)).min(axis=1)
    highest = np.where(spoken, last, 0).max(axis=1)
    rows = np.where(spoken.any(axis=1, keepdims=True), np.stack([lowest, highest], axis=1), 0)
    return rows.astype(np.int32)


def _diagonal_rows(of_word: np.ndarray, num_frames: int, width: float) -> np.ndarray:
    """A band around the diagonal, with straight edges (Tachibana et al., 2017, fade it out)."""
    spoken = np.flatnonzero(of_word.any(axis=1))
    first, count = spoken[0], spoken[-1] + 1 - spoken[0]
    places = (np.arange(num_frames) + 0.5) / num_frames
    lowest = np.floor((places - width) * count).clip(0)
    highest = np.ceil((places + width) * count).clip(max=count)
    return (first + np.stack([lowest, highest], axis=1)).astype(np.int32)
