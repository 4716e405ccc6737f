"""A take: speech that one of several seeds led to, with what it can be ranked by."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from csm_jax.inference.alignment.words import Word
from csm_jax.inference.notices import Notice
from csm_jax.inference.scores import Score

# Notices of speech that lacks something.
_FAULTS = {"cut", "guard_cut", "nothing_said"}


class Take:
    """One of several takes of a request, as a ranking function is given it.

    Attributes:
      seed: of its request; alone, with this seed, the request is spoken as in this take.
      codes: int32 [num_frames, Q].
      words: the words of the text and when they are spoken; empty without alignment heads.
      notices: remarks, such as that the speech was cut.
    """

    def __init__(
        self,
        seed: int,
        codes: np.ndarray,
        words: tuple[Word, ...],
        notices: tuple[Notice, ...],
        decode: Callable[[np.ndarray], np.ndarray],
        score: Callable[[], Score | None],
    ):
        """Keeps what is computed only if it is asked for.

        Args:
          decode: codes to audio.
          score: the value of `score`.
        """
        self.seed = seed
        self.codes = codes
        self.words = words
        self.notices = notices
        self._decode = decode
        self._score = score

    @functools.cached_property
    def audio(self) -> np.ndarray:
        """float32 [num_samples], decoded when it is asked for."""
        return self._decode(self.codes)

    @functools.cached_property
    def score(self) -> Score | None:
        """The log-probabilities of its codes, at temperature 1 and with the text as one part.

        They are computed for all takes when the first is asked for its own. None if the text fills
        the window.
        """
        return self._score()


# How good a take is, in values that can be compared; the take with the highest is kept.
Rank = Callable[[Take], Any]


def rank_take(take: Take) -> tuple[int, float]:
    """The built-in rank: the number of faults, negative, and among equals how sure the model was.

    Faults are words that were not spoken, and a cut. The second number is the mean confidence of
    the words plus the mean log-probability of all codes and the end, less the mean entropy of
    codebook 0, in nats.
    """
    kinds = {notice.kind for notice in take.notices}
    faults = sum(not word.spoken for word in take.words) + len(kinds & _FAULTS)
    confidence = sum(word.confidence for word in take.words) / max(1, len(take.words))
    return -faults, confidence + _certainty(take.score)


def _certainty(score: Score | None) -> float:
    if score is None:
        return 0.0
    if not len(score.codes):
        return -np.inf
    num_codes = score.log_probability.size + len(score.end_log_probability)
    return score.total / num_codes - float(score.entropy[:, 0].mean())
