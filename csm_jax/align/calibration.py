"""Finds the alignment heads of a checkpoint from recordings with transcripts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from csm_jax.align.recordings import Recording, attention_to
from csm_jax.checkpoints.alignment_heads import AlignmentHeads
from csm_jax.errors import InputError
from csm_jax.inference.alignment.tracking import WordTracker, boundary
from csm_jax.inference.alignment.words import row_weights
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.model.llama import Head

# Places of words with a lag of their own: the first words of a text are anticipated otherwise.
_PLACES = 3
# The recordings that a head is chosen on, and those that it is checked on.
_HALVES = slice(0, None, 2), slice(1, None, 2)
# A head below this score follows no speech; one of random weights has about 1 / (number of words).
LEAST_SCORE = 0.5
# The lag where no recording has times: one frame of Mimi.
_UNKNOWN_LAG = 0.08


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
    heads, masses = _find_candidates(model, recordings)
    followed = [[_follow(mass[i]) for i in range(len(heads))] for mass in masses]
    scores = np.array([[each.score for each in row] for row in followed])  # [recordings, heads]
    best = int(np.argmax(scores[::2].mean(axis=0)))
    checked = min(float(scores[half, best].mean()) for half in _HALVES)
    if checked < LEAST_SCORE:
        raise _none_follows(checked)
    chosen = [row[best] for row in followed]
    return AlignmentHeads(
        (heads[best],),
        _lags(chosen, recordings, model.config.frame_ms / 1000),
        _masses(chosen),
        source,
    )


def _find_candidates(
    model: LoadedModel, recordings: Sequence[Recording]
) -> tuple[list[Head], list[np.ndarray]]:
    """The heads that attend to single words enough, and what each recording's frames attend to in
    them, [N, F, W]: following the words takes long, and a model has hundreds of heads.

    Raises `InputError` if there are none.
    """
    backbone = model.config.backbone
    heads = tuple((i, j) for i in range(backbone.num_layers) for j in range(backbone.num_heads))
    masses = []
    for recording in recordings:
        weights = row_weights(recording.text, recording.speaker, model.tokenizer, model.config)
        masses.append(attention_to(model, recording, heads).transpose(1, 0, 2) @ weights)
    # No path has a better score than one that may go to any word at any time.
    bounds = np.array([mass.max(axis=-1).mean(axis=-1) for mass in masses])  # [recordings, heads]
    bound = np.minimum(*(bounds[half].mean(axis=0) for half in _HALVES))
    kept = np.flatnonzero(bound >= LEAST_SCORE)
    if not len(kept):
        raise _none_follows(float(bound.max()))
    return [heads[i] for i in kept], [mass[kept] for mass in masses]


def _none_follows(score: float) -> InputError:
    return InputError(
        f"no attention head follows the text: the best has a score of {score:.2f}, and "
        f"{LEAST_SCORE} is needed; a model with random weights has none"
    )


def _follow(mass: np.ndarray) -> _Followed:
    """The best path of a head, by its attention to each word, [F, W]."""
    tracker = WordTracker(mass.shape[1])
    tracker.push(mass)
    return _Followed(mass, tracker.path(len(mass), is_over=True))


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
