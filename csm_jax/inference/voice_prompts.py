"""Makes voices: prefills turns once, and mixes the prompts of several voices."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.inference.buckets import bucket
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.voice import Voice, VoiceLayer
from csm_jax.io.arguments import real_number
from csm_jax.model.csm import bind
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.layers import Array, Params
from csm_jax.prompt.turns import Prompt, Segment, Turn, join_rows


def make_voice(model: LoadedModel, turns: Sequence[Segment]) -> Voice:
    """The voice of some turns, as `Generator.make_voice`."""
    kept = [_with_codes(model, turn) for turn in turns]
    if not kept:
        raise InputError("a voice has no turns: give at least one recording")
    return _prefill(model, [kept], np.ones(1, np.float32))


def mix_voices(model: LoadedModel, voices: Sequence[Voice], weights: Sequence[float]) -> Voice:
    """A mixture of voices, as `Generator.mix_voices`."""
    if not voices or len(voices) != len(weights):
        raise InputError(f"{len(voices)} voices have {len(weights)} weights: give one for each")
    numbers = np.asarray([real_number(weight, "weight of a voice") for weight in weights])
    total = numbers.sum()
    if not np.isfinite(numbers).all() or numbers.min() < 0 or total <= 0:
        raise InputError(f"weights of voices are {list(weights)}, but must be from 0, not all 0")
    for voice in voices:
        voice.check(model.identity)
        if voice.is_mixed:
            raise InputError("a voice is mixed already: mix all voices of it at once")
    turns = _as_long([voice.turns for voice in voices])
    return _prefill(model, turns, (numbers / total).astype(np.float32))


def _with_codes(model: LoadedModel, turn: Segment) -> Segment:
    """A pinned turn with codes instead of audio. Raises `InputError`."""
    rows = Turn(turn, model.config, model.tokenizer).rows(model.encode)
    if len(rows) == 1:
        raise InputError("a turn of a voice has no recording: give it audio or codes")
    return Segment(turn.speaker, turn.text, codes=rows[1].frames[:-1, :-1], pinned=True)


def _as_long(voices: Sequence[Sequence[Segment]]) -> list[list[Segment]]:
    """The turns of each voice, cut so that those at the same place have the same rows."""
    texts = [[(turn.speaker, turn.text) for turn in turns] for turns in voices]
    if any(each != texts[0] for each in texts):
        raise InputError(
            "voices can only be mixed if their turns have the same speakers and transcripts, such "
            "as none (text=None): make them so"
        )
    places = [_cut(turns) for turns in zip(*voices, strict=True)]
    return [list(turns) for turns in zip(*places, strict=True)]


def _cut(turns: Sequence[Segment]) -> list[Segment]:
    """Turns with as many frames as the shortest."""
    codes = [np.asarray(turn.codes) for turn in turns]
    length = min(map(len, codes))
    return [
        dataclasses.replace(turn, codes=each[:length])
        for turn, each in zip(turns, codes, strict=True)
    ]


def _prefill(model: LoadedModel, voices: Sequence[Sequence[Segment]], weights: np.ndarray) -> Voice:
    config, limit = model.config, model.config.backbone.max_seq_len
    prompts = [_rows(model, turns) for turns in voices]
    length = len(prompts[0].frames)
    if length >= limit:
        raise InputError(
            f"the turns of a voice take {length} positions, but fewer than {limit} fit: cut them"
        )
    # As long as `DecodeBatch` makes them, so that the numbers are the same to the bit.
    padded = min(bucket(length, model.inference.min_bucket), limit)
    frames, mask = (
        np.stack([np.pad(rows, ((0, padded - length), (0, 0))) for rows in parts])
        for parts in zip(*prompts, strict=True)
    )
    filled = jax.device_get(prefill_mixed(model.params, frames, mask, weights, config=config))
    layers = tuple(
        VoiceLayer(*(array[0, :, :, :length] for array in layer)) for layer in filled.layers
    )
    return Voice(tuple(voices[0]), layers, model.identity, is_mixed=len(voices) > 1)


def _rows(model: LoadedModel, turns: Sequence[Segment]) -> Prompt:
    parts = [Turn(turn, model.config, model.tokenizer).rows() for turn in turns]
    return join_rows([rows for part in parts for rows in part])


@functools.partial(jax.jit, static_argnames="config")
def prefill_mixed(
    params: Params, frames: Array, mask: Array, weights: Array, *, config: CSMConfig
) -> KVCache:
    """Keys and values of a prompt whose rows are the weighted sums of several prompts' embeddings.

    Args:
      frames, mask: [N, T, Q + 1] of N prompts, padded on the right.
      weights: float32 [N].
    """
    model = bind(config, params)
    embedded = model.embed(frames, mask)  # [N, T, D]
    mixed = embedded
    if len(frames) > 1:
        summed = jnp.einsum("n,ntd->td", weights, embedded.astype(jnp.float32))
        mixed = summed[None].astype(embedded.dtype)
    cache = KVCache.create(config.backbone, 1, frames.shape[1], model.dtype, num_lengths=1)
    return model.backbone(mixed, cache)[1]
