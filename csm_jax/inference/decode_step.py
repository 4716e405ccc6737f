"""Prefill, the frame step and the compiled frame loop: pure functions of the state.

The step is advance-then-sample: it feeds the last row (the end of the prompt, or the frame
before) to the backbone and samples the next frame. So prefill is the prompt without its last
row, the first frame costs no more than any other, and offline generation, streaming and batching
share one step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from csm_jax.config import CSMConfig
from csm_jax.inference.row_interventions import NO_INTERVENTIONS, RowInterventions
from csm_jax.inference.text_positions import TEXT_POSITIONS, TextRows, end_bias, text_weights
from csm_jax.model.changes import doubled
from csm_jax.model.csm import CSM, bind
from csm_jax.model.kernels.choice import XLA, bind_to_kernels
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.layers import Array, Params
from csm_jax.model.llama import Head
from csm_jax.model.logits_functions import (
    NO_CALLS,
    NO_STATES,
    Calls,
    CallStates,
)
from csm_jax.model.random_numbers import random_key
from csm_jax.model.sampling import SamplingParams
from csm_jax.model.sharding import keep_sharded, traced_for

# Frames per call of the compiled loop, at most: 2 s of audio between two looks at the host.
CHUNK_FRAMES = 25


class GenerationState(NamedTuple):
    """Everything that a batch needs for its next frame.

    With guidance, `cache`, `frame` and `mask` have 2 * B rows: those of all first prompts, and then
    those of all second ones.

    Attributes:
      cache: the backbone's keys and values; `cache.lengths` are the rows' positions.
      frame: int32 [B, Q + 1], the row to feed next.
      mask: bool [B, Q + 1], its columns that count.
      keys: PRNG keys [B]; frame t of a row draws from `fold_in(key, t)`.
      num_frames: int32 [B], frames sampled so far, the end-of-speech frame included.
      seen: bool [B, V], codebook-0 ids sampled so far.
      done: bool [B], the row has reached its end of speech.
      functions: the states of functions of logits.
    """

    cache: KVCache
    frame: Array
    mask: Array
    keys: Array
    num_frames: Array
    seen: Array
    done: Array
    functions: CallStates = NO_STATES


class Position(NamedTuple):
    """Where a prompt of a `GenerationState` continues from, apart from its keys and values."""

    length: ArrayLike
    frame: ArrayLike
    mask: ArrayLike


class Row(NamedTuple):
    """Where one row of a `GenerationState` continues from: the position of its first prompt, and
    what is drawn after it."""

    length: ArrayLike
    frame: ArrayLike
    mask: ArrayLike
    seed: ArrayLike  # uint32
    num_frames: ArrayLike
    seen: ArrayLike
    done: ArrayLike
    functions: CallStates = NO_STATES


class Frames(NamedTuple):
    """Frames of all rows.

    Attributes:
      codes: int32 [B, F, Q].
      attention: float32 [B, F, N, L], how much N heads attended to the first L positions of the
        text, at the step that sampled the frame; None without such heads.
    """

    codes: Array
    attention: Array | None


def frame_step(
    model: CSM,
    state: GenerationState,
    sampling: SamplingParams,
    kv_length: int | None = None,
    text: TextRows | None = None,
    heads: tuple[Head, ...] = (),
    interventions: RowInterventions = NO_INTERVENTIONS,
    calls: Calls = NO_CALLS,
) -> tuple[GenerationState, Frames]:
    """One frame for every row: the pure function all generation is made of.

    Args:
      kv_length: as for `Llama.__call__`.
      text: None leaves the end of speech alone, and there is no attention to return.
      heads: whose attention to `text` is returned.
      interventions: what is changed in this frame.
      calls: functions of logits.

    Returns:
      The next state, and one frame. A frame of zeros is the end of speech; rows that are done keep
      returning zeros.
    """
    num_rows, num_prompts = len(state.done), len(state.frame)
    changes = doubled(interventions.backbone.at(state.num_frames), num_prompts)
    hidden, cache, observed = model.advance(
        state.frame, state.mask, state.cache, kv_length, heads, changes
    )
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_frames)
    changes = interventions.at(state.num_frames, end_bias(text, model.config.num_codebooks))
    functions = interventions.functions_at(state.num_frames, state.frame, calls)
    codes, states = model.generate_frame(
        hidden[:, 0], keys, sampling, state.seen, changes, functions, state.functions
    )
    codes = jnp.where(state.done[:, None], 0, codes)
    # Rows that are done do not advance: they would run out of their cache.
    is_done = doubled(state.done, num_prompts)
    lengths = jnp.where(is_done, state.cache.lengths, cache.lengths)
    state = GenerationState(
        cache=cache._replace(lengths=lengths),
        frame=doubled(jnp.pad(codes, ((0, 0), (0, 1))), num_prompts),
        mask=jnp.broadcast_to(_audio_columns(model.config)[None], state.mask.shape),
        keys=state.keys,
        num_frames=jnp.where(state.done, state.num_frames, state.num_frames + 1),
        seen=state.seen | jax.nn.one_hot(codes[:, 0], state.seen.shape[1], dtype=bool),
        done=state.done | jnp.all(codes == 0, axis=-1),
        functions=states,
    )
    attention = (
        None if text is None else text_weights(observed.attention[:num_rows, :, 0], text)[:, None]
    )
    return state, Frames(codes[:, None], attention)


def _audio_columns(config: CSMConfig) -> Array:
    return jnp.arange(config.num_codebooks + 1, dtype=jnp.int32) < config.num_codebooks


@functools.partial(jax.jit, static_argnames=("config", "batch", "max_seq_len", "dtype", "mesh"))
def init_state(
    *,
    config: CSMConfig,
    batch: int,
    max_seq_len: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> GenerationState:
    """A batch of empty rows, which count as done."""
    columns = config.num_codebooks + 1
    state = GenerationState(
        cache=KVCache.create(config.backbone, batch, max_seq_len, dtype, num_lengths=batch),
        frame=jnp.zeros((batch, columns), jnp.int32),
        mask=jnp.zeros((batch, columns), bool),
        keys=jax.vmap(random_key)(jnp.zeros((batch,), jnp.uint32)),
        num_frames=jnp.zeros((batch,), jnp.int32),
        seen=jnp.zeros((batch, config.audio_vocab_size), bool),
        done=jnp.ones((batch,), bool),
    )
    return keep_sharded(state, mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="state")
def prefill(
    params: Params,
    state: GenerationState,
    frames: Array,
    mask: Array,
    index: Array,
    prefix: KVCache | None = None,
    *,
    config: CSMConfig,
    mesh: Mesh | None = None,
) -> GenerationState:
    """Fills the cache of one row with a prompt; `set_row` then starts it. Donates `state`.

    Args:
      frames, mask: [T, Q + 1], int32 and bool, padded on the right. The last row of a prompt
        need not be there: the first step feeds it.
      index: int32 [], the row of the batch.
      prefix: of `prefill_prefix`, what the prompt begins with; `frames` are what follows.
    """
    filled = _fill(bind(config, params), frames, mask, prefix)

    def place(whole: Array, part: Array) -> Array:
        # Padding may reach beyond the row.
        fitting = part[tuple(slice(size) for size in whole.shape)]
        return jax.lax.dynamic_update_slice_in_dim(whole, fitting, index, 0)

    layers = jax.tree.map(place, state.cache.layers, filled.layers)
    return keep_sharded(state._replace(cache=state.cache._replace(layers=layers)), mesh)


@functools.partial(jax.jit, static_argnames="config")
def prefill_prefix(
    params: Params, frames: Array, mask: Array, length: Array, *, config: CSMConfig
) -> KVCache:
    """Keys and values of rows that many prompts begin with.

    Args:
      frames, mask: [T, Q + 1], int32 and bool, padded on the right.
      length: int32 [], of these without the padding.
    """
    filled = _fill(bind(config, params), frames, mask, None)
    return filled._replace(lengths=length[None])


def _fill(model: CSM, frames: Array, mask: Array, prefix: KVCache | None) -> KVCache:
    """A cache of one row with `prefix` and `frames`, as long as both with their padding."""
    room = len(frames) + (prefix.layers[0].value.shape[3] if prefix else 0)
    cache = KVCache.create(model.config.backbone, 1, room, model.dtype, num_lengths=1)
    if prefix:
        layers = jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (0, 0, 0, 0)),
            cache.layers,
            prefix.layers,
        )
        cache = KVCache(layers, prefix.lengths)
    return model.backbone(model.embed(frames[None], mask[None]), cache)[1]


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def set_row(
    state: GenerationState, index: Array, row: Row, *, mesh: Mesh | None = None
) -> GenerationState:
    """Sets where one row of the batch continues from. Donates `state`."""
    key = random_key(row.seed)
    state = _at_position(state, index, row)._replace(
        keys=state.keys.at[index].set(key),
        num_frames=state.num_frames.at[index].set(row.num_frames),
        seen=state.seen.at[index].set(row.seen),
        done=state.done.at[index].set(row.done),
        functions=jax.tree.map(
            lambda states, value: states.at[index].set(value), state.functions, row.functions
        ),
    )
    return keep_sharded(state, mesh)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def set_position(
    state: GenerationState, index: Array, position: Position, *, mesh: Mesh | None = None
) -> GenerationState:
    """Sets where one prompt of the batch continues from. Donates `state`."""
    return keep_sharded(_at_position(state, index, position), mesh)


def _at_position(state: GenerationState, index: Array, to: Position | Row) -> GenerationState:
    return state._replace(
        cache=state.cache._replace(lengths=state.cache.lengths.at[index].set(to.length)),
        frame=state.frame.at[index].set(to.frame),
        mask=state.mask.at[index].set(to.mask),
    )


@functools.partial(jax.jit, static_argnames=("num_prompts", "mesh"))
def set_num_prompts(
    state: GenerationState, *, num_prompts: int, mesh: Mesh | None = None
) -> GenerationState:
    """A state with room for so many prompts, one or two for each row; the first ones are kept."""

    def resize(x: Array) -> Array:
        padding = [(0, max(0, num_prompts - len(x))), *[(0, 0)] * (x.ndim - 1)]
        return jnp.pad(x[:num_prompts], padding)

    cache, frame, mask = jax.tree.map(resize, (state.cache, state.frame, state.mask))
    return keep_sharded(state._replace(cache=cache, frame=frame, mask=mask), mesh)


@functools.partial(
    jax.jit,
    static_argnames=("config", "kv_length", "heads", "calls", "mesh", "kernels"),
    donate_argnames="state",
)
def run_frames(
    params: Params,
    state: GenerationState,
    sampling: SamplingParams,
    num_frames: Array,
    pause: Array,
    text: TextRows | None = None,
    interventions: RowInterventions = NO_INTERVENTIONS,
    *,
    config: CSMConfig,
    kv_length: int | None = None,
    heads: tuple[Head, ...] = (),
    calls: Calls = NO_CALLS,
    mesh: Mesh | None = None,
    kernels: str = XLA,
) -> tuple[GenerationState, Frames, Array]:
    """Generates up to `num_frames` (at most `CHUNK_FRAMES`) frames, or until all rows end.

    `state` is donated: use the one returned.

    Args:
      pause: bool [], whether to stop as soon as any row ends.
      text, heads, interventions, calls: as for `frame_step`.
      kv_length: as for `Llama.__call__`.
      kernels: as `kernels.choose` returns them.

    Returns:
      The state; `CHUNK_FRAMES` frames; and how many of those were run.
    """
    model = bind_to_kernels(config, params, kernels)
    done_before = state.done

    def unfinished(carry: tuple[GenerationState, Frames, Array]) -> Array:
        state, _, count = carry
        has_ended = jnp.any(state.done & ~done_before)
        return (count < num_frames) & ~jnp.all(state.done) & ~(pause & has_ended)

    def body(
        carry: tuple[GenerationState, Frames, Array],
    ) -> tuple[GenerationState, Frames, Array]:
        state, buffers, count = carry
        state, frame = frame_step(
            model, state, sampling, kv_length, text, heads, interventions, calls
        )
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=count, axis=1)
        return state, jax.tree.map(put, buffers, frame), count + 1

    batch, length = len(state.done), min(kv_length or _room(state), TEXT_POSITIONS)
    buffers = Frames(
        jnp.zeros((batch, CHUNK_FRAMES, config.num_codebooks), jnp.int32),
        None if text is None else jnp.zeros((batch, CHUNK_FRAMES, len(heads), length)),
    )
    carry = state, buffers, jnp.zeros((), jnp.int32)
    with traced_for(mesh):
        state, buffers, count = jax.lax.while_loop(unfinished, body, carry)
    return keep_sharded(state, mesh), buffers, count


def _room(state: GenerationState) -> int:
    """Positions of a row."""
    return state.cache.layers[0].value.shape[3]
