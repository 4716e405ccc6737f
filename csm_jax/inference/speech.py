"""The result of a request, with all that is known about it."""

from dataclasses import dataclass

import numpy as np

from csm_jax.inference.alignment.words import Word
from csm_jax.inference.request import Notice
from csm_jax.inference.take import Take


@dataclass(frozen=True, eq=False)
class Speech:
    """The speech of a request.

    Attributes:
      audio: float32 [num_samples].
      sample_rate: Hz of `audio`.
      codes: int32 [num_frames, Q].
      words: the words of the text and when they are spoken; empty if the checkpoint has no
        alignment heads (`csm_jax.align`).
      notices: remarks, such as that the speech was cut.
      takes: with `best_of`, all of them, the best first; this is the speech of the first.
    """

    audio: np.ndarray
    sample_rate: int
    codes: np.ndarray
    words: tuple[Word, ...]
    notices: tuple[Notice, ...]
    takes: tuple[Take, ...] = ()
