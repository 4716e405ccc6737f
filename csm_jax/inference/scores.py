"""Scores: how likely a model finds given speech, code by code, in one pass of both stacks."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.inference.buckets import bucket
from csm_jax.inference.given_speech import GivenRows, GivenSpeech, batches
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.model.csm import bind
from csm_jax.model.layers import AnyArray, Array, Params
from csm_jax.model.sampling import Sampling, SamplingParams, filter_logits, penalize_repetition
from csm_jax.model.teacher_forcing import frame_logits, frames_from

# Frames whose logits are in memory at once: 65 536 numbers each at full size.
_FRAMES_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Score:
    """How likely a model finds speech, code by code.

    Each code is predicted from the conversation, the text, and all codes before it: the earlier
    frames, and the codebooks before it in its own frame.

    Attributes:
      codes: int32 [F, Q], of the speech.
      log_probability: float32 [F, Q], nats; -inf of a code that the sampling never draws.
      entropy: float32 [F, Q], nats, of the distribution that each code was drawn from.
      rank: int32 [F, Q], how many ids are likelier than the code; 0 is the likeliest.
      end_log_probability: float32 [Q], nats, of the frame of zeros after the last frame, which is
        the end of speech.
    """

    codes: np.ndarray
    log_probability: np.ndarray
    entropy: np.ndarray
    rank: np.ndarray
    end_log_probability: np.ndarray

    @property
    def total(self) -> float:
        """The log-probability of the speech and of its end, nats."""
        ended = self.end_log_probability.sum(dtype=np.float64)
        return float(self.log_probability.sum(dtype=np.float64) + ended)


class _CodeScores(NamedTuple):
    """Arrays [..., Q], as in `Score`."""

    log_probability: Array
    entropy: Array
    rank: Array


def score_speech(
    model: LoadedModel,
    speeches: Sequence[GivenSpeech],
    sampling: Sampling | None,
    max_batch: int,
) -> list[Score]:
    """The scores of speech, in its order.

    Args:
      sampling: the filters that codes are drawn with; None is the model's own distribution, at
        temperature 1.
      max_batch: how many at once.
    """
    scores: list[Score | None] = [None] * len(speeches)
    for indices, rows in batches(speeches, max_batch):
        values = None if sampling is None else SamplingParams.stack([sampling] * len(rows.frames))
        num_frames = bucket(max(len(speeches[i].codes) for i in indices) + 1, _FRAMES_AT_ONCE)
        scored = jax.device_get(
            _score(model.params, rows, values, config=model.config, num_frames=num_frames)
        )
        for row, index in enumerate(indices):
            of_row = _CodeScores(*(array[row] for array in scored))
            scores[index] = _score_of(speeches[index].codes, of_row)
    return [score for score in scores if score is not None]


def _score_of(codes: np.ndarray, scored: _CodeScores) -> Score:
    """The part of padded arrays [K, Q] that belongs to codes [F, Q] and their end."""
    log_probability, entropy, rank = map(np.asarray, scored)
    size = len(codes)
    end = log_probability[size]
    return Score(codes, log_probability[:size], entropy[:size], rank[:size], end)


@functools.partial(jax.jit, static_argnames=("config", "num_frames"))
def _score(
    params: Params,
    rows: GivenRows,
    sampling: SamplingParams | None,
    *,
    config: CSMConfig,
    num_frames: int,
) -> _CodeScores:
    """Arrays [B, num_frames, Q] of the frames from each row's start on."""
    model = bind(config, params)
    hidden = model.hidden(rows.frames, rows.mask)
    states, codes = frames_from(hidden, rows.frames, rows.start, num_frames)
    drawn = None
    if sampling is not None:
        by_frame = jax.tree.map(lambda x: jnp.repeat(x, num_frames, axis=0), sampling)
        seen = _seen_before(codes[..., 0], config.audio_vocab_size)
        drawn = by_frame, seen.reshape(-1, seen.shape[-1])

    def score(part: tuple[Array, Array, tuple[SamplingParams, Array] | None]) -> _CodeScores:
        states, codes, drawn = part
        logits = frame_logits(model, states, codes)  # [_FRAMES_AT_ONCE, Q, V]
        return _code_scores(logits if drawn is None else _filtered(logits, *drawn), codes)

    # One part after the other, because of their logits.
    flat = states.reshape(-1, states.shape[-1]), codes.reshape(-1, codes.shape[-1]), drawn
    parts = jax.tree.map(lambda x: x.reshape(-1, _FRAMES_AT_ONCE, *x.shape[1:]), flat)
    scored = jax.lax.map(score, parts)
    return jax.tree.map(lambda x: x.reshape(*codes.shape), scored)


def _seen_before(codes: Array, vocab: int) -> Array:
    """The codebook-0 ids of each row's earlier frames: int32 [B, K] to bool [B, K, V]."""
    used = jax.nn.one_hot(codes, vocab, dtype=jnp.int8)
    return jax.lax.cummax(jnp.pad(used, ((0, 0), (1, 0), (0, 0)))[:, :-1], axis=1) > 0


def _filtered(logits: Array, sampling: SamplingParams, seen: Array) -> Array:
    """Logits [M, Q, V] as they are drawn from; -inf for ids that are not."""
    num_depth = logits.shape[1] - 1
    first = penalize_repetition(logits[:, 0], seen, sampling.repetition_penalty)
    first = filter_logits(first, sampling.backbone)
    by_code = jax.tree.map(lambda x: jnp.repeat(x, num_depth, axis=0), sampling.depth_decoder)
    rest = filter_logits(logits[:, 1:].reshape(-1, logits.shape[-1]), by_code)
    return jnp.concatenate([first[:, None], rest.reshape(-1, num_depth, logits.shape[-1])], axis=1)


def _code_scores(logits: Array, codes: AnyArray) -> _CodeScores:
    """Arrays [M, Q] of logits [M, Q, V] and codes [M, Q]."""
    logs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logs, codes[..., None], axis=-1)
    terms = jnp.where(jnp.isfinite(logs), jnp.exp(logs) * logs, 0)
    return _CodeScores(
        log_probability=chosen[..., 0],
        entropy=-jnp.sum(terms, axis=-1),
        rank=jnp.sum(logs > chosen, axis=-1, dtype=jnp.int32),
    )
