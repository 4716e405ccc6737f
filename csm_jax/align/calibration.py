"""Finds the alignment heads of a checkpoint from recordings with transcripts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from csm_jax.align.heads import AlignmentHeads
from csm_jax.align.recordings import Recording, attention_to
from csm_jax.align.tracking import WordTracker, boundary
from csm_jax.align.words import row_weights
from csm_jax.errors import InputError
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.model.llama import Head

# Places of words with a lag of their own: the first words of a text are anticipated otherwise.
_PLACES = 3
# A head below this score follows no speech; one of random weights has about 1 / (number of words).
LEAST_SCORE = 0.5
# The lag where no recording has times: half of Mimi's frame.
_UNKNOWN_LAG = 0.04


class _Followed(NamedTuple):
    """What a head attends to in a recording: mass float [F, W], and the best path int [F]."""

    mass: np.ndarray
    path: np.ndarray

    @property
    def score(self) -> float:
        """Mean attention to the word of the path, times the share of words that are on it."""
        on_path = self.mass[np.arange(len(self.path)), self.path].mean()
        return float(on_path * len(set(self.path)) / self.mass.shape[1])


def calibrate(
    model: LoadedModel, recordings: Sequence[Recording], source: str = ""
) -> AlignmentHeads:
    """The head that follows the speech best, and its lags.

    The head is chosen on every second recording, by a score that needs no truth: attention to the
    words, in their order, all of them. It has to hold on the other half too. The lags are medians
    over the recordings whose `starts` are known.

    Args:
      recordings: at least two.
      source: a remark for the file.

    Raises:
      InputError: there are too few recordings, or no head follows them.
    """
    if len(recordings) < 2:
        raise InputError(f"there are {len(recordings)} recordings, but calibration needs two")
    backbone = model.config.backbone
    heads = tuple((i, j) for i in range(backbone.num_layers) for j in range(backbone.num_heads))
    followed = [_follow(model, recording, heads) for recording in recordings]
    scores = np.array([[each.score for each in row] for row in followed])  # [recordings, heads]
    best = int(np.argmax(scores[::2].mean(axis=0)))
    checked = float(scores[1::2, best].mean())
    if min(float(scores[::2, best].mean()), checked) < LEAST_SCORE:
        raise InputError(
            f"no attention head follows the text: the best has a score of {checked:.2f}, and "
            f"{LEAST_SCORE} is needed; a model with random weights has none"
        )
    chosen = [row[best] for row in followed]
    return AlignmentHeads(
        (heads[best],),
        _lags(chosen, recordings, model.config.frame_ms / 1000),
        _masses(chosen),
        source,
    )


def _follow(model: LoadedModel, recording: Recording, heads: tuple[Head, ...]) -> list[_Followed]:
    attention = attention_to(model, recording, heads)
    weights = row_weights(recording.text, recording.speaker, model.tokenizer)
    found = []
    for index in range(len(heads)):
        mass = attention[:, index] @ weights
        tracker = WordTracker(weights.shape[1])
        tracker.push(mass)
        found.append(_Followed(mass, tracker.path(len(mass), is_over=True)))
    return found


def _lags(
    followed: Sequence[_Followed], recordings: Sequence[Recording], frame_seconds: float
) -> tuple[float, ...]:
    """Median time from the move of the attention to the start of the word, by the word's place."""
    leads: list[list[float]] = [[] for _ in range(_PLACES)]
    for each, recording in zip(followed, recordings, strict=True):
        starts = recording.starts
        if starts is None:
            continue
        if len(starts) != each.mass.shape[1]:
            raise InputError(
                f"{recording.text!r} has {each.mass.shape[1]} words, but {len(starts)} starts"
            )
        for word in set(each.path.tolist()):
            moved = boundary(each.mass, each.path, word) * frame_seconds
            leads[min(word, _PLACES - 1)].append(starts[word] - moved)
    known = [float(np.clip(np.median(lead), -1, 1)) if lead else _UNKNOWN_LAG for lead in leads]
    return tuple(round(lag, 3) for lag in known)


def _masses(followed: Sequence[_Followed]) -> tuple[float, ...]:
    """Median attention to a word while it is spoken, by its place."""
    masses: list[list[float]] = [[] for _ in range(_PLACES)]
    for each in followed:
        for word in set(each.path.tolist()):
            masses[min(word, _PLACES - 1)].append(float(each.mass[each.path == word, word].mean()))
    return tuple(round(max(float(np.median(mass)), 0.01), 3) if mass else 1.0 for mass in masses)
