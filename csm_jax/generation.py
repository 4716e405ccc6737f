"""Prefill, the frame step and the compiled frame loop.

The step is advance-then-sample: it feeds the last row (the end of the prompt, or the frame
before) to the backbone and samples the next frame. So prefill is the prompt without its last
row, the first frame costs no more than any other, and offline generation, streaming and batching
share one step.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.cache import KVCache
from csm_jax.config import CSMConfig
from csm_jax.model import CSM, bind
from csm_jax.sampling import Sampling, SamplingParams

Array = jax.Array
Params = dict[str, Any]
Prompt = tuple[np.ndarray, np.ndarray]

# Frames per call of the compiled loop, at most: 2 s of audio between two looks at the host; and
# 0.4 s where somebody watches.
CHUNK_FRAMES = 25
WATCHED_FRAMES = 5


class GenerationState(NamedTuple):
    """Everything that a running batch needs for its next frame.

    Attributes:
      cache: the backbone's keys and values; `cache.lengths` are the rows' positions.
      frame: int32 [B, Q + 1], the row to feed next.
      mask: bool [B, Q + 1], its columns that count.
      keys: PRNG keys [B]; frame t of a row draws from `fold_in(key, t)`.
      num_frames: int32 [B], frames sampled so far, the end-of-speech frame included.
      seen: bool [B, V], codebook-0 ids sampled so far.
      done: bool [B], the row has reached its end of speech.
    """

    cache: KVCache
    frame: Array
    mask: Array
    keys: Array
    num_frames: Array
    seen: Array
    done: Array


def frame_step(
    model: CSM, state: GenerationState, sampling: SamplingParams
) -> tuple[GenerationState, Array]:
    """One frame for every row: the pure function all generation is made of.

    Returns:
      The next state, and codes int32 [B, Q]. A frame of zeros is the end of speech; rows that
      are done keep returning zeros.
    """
    embedded = model.embed(state.frame[:, None], state.mask[:, None])
    hidden, cache = model.backbone(embedded, state.cache)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_frames)
    codes = model.generate_frame(hidden[:, 0], keys, sampling, state.seen)
    codes = jnp.where(state.done[:, None], 0, codes)
    state = GenerationState(
        cache=cache,
        frame=jnp.pad(codes, ((0, 0), (0, 1))),
        mask=jnp.broadcast_to(_audio_columns(model.config)[None], state.mask.shape),
        keys=state.keys,
        num_frames=jnp.where(state.done, state.num_frames, state.num_frames + 1),
        seen=state.seen | jax.nn.one_hot(codes[:, 0], state.seen.shape[1], dtype=bool),
        done=state.done | jnp.all(codes == 0, axis=-1),
    )
    return state, codes


def _audio_columns(config: CSMConfig) -> Array:
    return jnp.arange(config.num_codebooks + 1) < config.num_codebooks


@functools.partial(jax.jit, static_argnames=("config", "cache_length"))
def prefill(
    params: Params,
    frames: Array,
    mask: Array,
    lengths: Array,
    seeds: Array,
    *,
    config: CSMConfig,
    cache_length: int,
) -> GenerationState:
    """Reads prompts into a new cache; their last rows are left for the first step to feed.

    Args:
      frames, mask: [B, T, Q + 1], int32 and bool, padded on the right.
      lengths: int32 [B], the prompts' own lengths, at most T.
      seeds: uint32 [B].
      cache_length: positions to make room for, at least T.
    """
    model = bind(config, params)
    batch = len(lengths)
    cache = KVCache.create(config.backbone, batch, cache_length, model.dtype)
    _, cache = model.backbone(model.embed(frames, mask), cache)
    last = lengths - 1
    rows = jnp.arange(batch)
    return GenerationState(
        # The last row is fed again, by the first step; it writes the same key once more.
        cache=cache._replace(lengths=last),
        frame=frames[rows, last],
        mask=mask[rows, last],
        keys=jax.vmap(jax.random.key)(seeds),
        num_frames=jnp.zeros((batch,), jnp.int32),
        seen=jnp.zeros((batch, config.audio_vocab_size), bool),
        done=jnp.zeros((batch,), bool),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def run_frames(
    params: Params,
    state: GenerationState,
    sampling: SamplingParams,
    num_frames: Array,
    *,
    config: CSMConfig,
) -> tuple[GenerationState, Array, Array]:
    """Generates up to `num_frames` (at most `CHUNK_FRAMES`) frames, or until all rows end.

    `state` is donated: use the one returned.

    Returns:
      The state; codes int32 [B, CHUNK_FRAMES, Q]; and how many of those frames were run.
    """
    model = bind(config, params)

    def unfinished(carry: tuple[GenerationState, Array, Array]) -> Array:
        state, _, count = carry
        return (count < num_frames) & ~jnp.all(state.done)

    def body(carry: tuple[GenerationState, Array, Array]):
        state, buffer, count = carry
        state, codes = frame_step(model, state, sampling)
        buffer = jax.lax.dynamic_update_slice(buffer, codes[:, None], (0, count, 0))
        return state, buffer, count + 1

    buffer = jnp.zeros((len(state.done), CHUNK_FRAMES, config.num_codebooks), jnp.int32)
    return jax.lax.while_loop(unfinished, body, (state, buffer, jnp.zeros((), jnp.int32)))


def generate(
    config: CSMConfig,
    params: Params,
    prompts: Sequence[Prompt],
    sampling: Sequence[Sampling],
    seeds: Sequence[int],
    max_frames: int,
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Generates a batch of utterances to their ends or to `max_frames`.

    Args:
      prompts: per row frames int32 [T, Q + 1] and mask bool [T, Q + 1].
      sampling: per row.
      seeds: one whole number per row; its lowest 32 bits count.
      progress: called with the number of frames so far, every few of them.

    Returns:
      Per row codes int32 [num_frames, Q], without the end-of-speech frame.
    """
    chunks = []
    state = _start(config, params, prompts, seeds, max_frames)
    values = SamplingParams.stack(list(sampling))
    chunk_frames = CHUNK_FRAMES if progress is None else WATCHED_FRAMES
    for chunk, count in _chunks(config, params, state, values, max_frames, chunk_frames):
        chunks.append(chunk)
        if progress is not None:
            progress(count)
    codes = np.concatenate(chunks, axis=1)
    return [_until_end_of_speech(row) for row in codes]


def _start(
    config: CSMConfig,
    params: Params,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    max_frames: int,
) -> GenerationState:
    """Prefill of prompts of any lengths, in one of a few compiled shapes."""
    lengths = np.asarray([len(frames) for frames, _ in prompts], np.int32)
    longest, limit = int(lengths.max()), config.backbone.max_seq_len
    padded = min(_bucket(longest), limit)
    return prefill(
        params,
        np.stack([_pad(frames, padded) for frames, _ in prompts]),
        np.stack([_pad(mask, padded) for _, mask in prompts]),
        lengths,
        np.asarray([seed % 2**32 for seed in seeds], np.uint32),
        config=config,
        cache_length=min(_bucket(longest + max_frames), limit),
    )


def _chunks(
    config: CSMConfig,
    params: Params,
    state: GenerationState,
    sampling: SamplingParams,
    max_frames: int,
    chunk_frames: int,
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields codes [B, n, Q] and the number of frames so far."""
    total = 0
    while total < max_frames:
        wanted = min(chunk_frames, max_frames - total)
        state, codes, count = run_frames(params, state, sampling, np.int32(wanted), config=config)
        total += int(count)
        yield np.asarray(codes)[:, : int(count)], total
        if np.all(state.done):
            return


def _until_end_of_speech(codes: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero((codes == 0).all(axis=-1))
    return codes[: ends[0]] if len(ends) else codes


def _pad(rows: np.ndarray, length: int) -> np.ndarray:
    return np.pad(rows, ((0, length - len(rows)), (0, 0)))


@functools.cache
def _bucket(length: int) -> int:
    """The next power of two, 32 at least: a handful of compiled shapes serve every prompt."""
    return max(32, 1 << (length - 1).bit_length())
