"""Prefill, the frame step, the compiled frame loop, and the running batch around them.

The step is advance-then-sample: it feeds the last row (the end of the prompt, or the frame
before) to the backbone and samples the next frame. So prefill is the prompt without its last
row, the first frame costs no more than any other, and offline generation, streaming and batching
share one step.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from csm_jax.cache import KVCache
from csm_jax.config import CSMConfig
from csm_jax.model import CSM, bind
from csm_jax.sampling import Sampling, SamplingParams
from csm_jax.sharding import check_rows, keep_sharded, place_rows

Array = jax.Array
Params = dict[str, Any]
Prompt = tuple[np.ndarray, np.ndarray]

# Frames per call of the compiled loop, at most: 2 s of audio between two looks at the host.
CHUNK_FRAMES = 25


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


class Row(NamedTuple):
    """What one row of a `GenerationState` goes on from, apart from its keys and values."""

    length: int | Array
    frame: np.ndarray | Array
    mask: np.ndarray | Array
    seed: int | Array  # uint32
    num_frames: int | Array
    seen: np.ndarray | Array
    done: bool | Array


def frame_step(
    model: CSM, state: GenerationState, sampling: SamplingParams, attended: int | None = None
) -> tuple[GenerationState, Array]:
    """One frame for every row: the pure function all generation is made of.

    Args:
      attended: as for `Llama.__call__`.

    Returns:
      The next state, and codes int32 [B, Q]. A frame of zeros is the end of speech; rows that
      are done keep returning zeros.
    """
    embedded = model.embed(state.frame[:, None], state.mask[:, None])
    hidden, cache = model.backbone(embedded, state.cache, attended)
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_frames)
    codes = model.generate_frame(hidden[:, 0], keys, sampling, state.seen)
    codes = jnp.where(state.done[:, None], 0, codes)
    # Rows that are done stand still: they would run out of their cache.
    lengths = jnp.where(state.done, state.cache.lengths, cache.lengths)
    state = GenerationState(
        cache=cache._replace(lengths=lengths),
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


@functools.partial(jax.jit, static_argnames=("config", "batch", "max_seq_len", "dtype", "mesh"))
def init_state(
    *,
    config: CSMConfig,
    batch: int,
    max_seq_len: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> GenerationState:
    """A batch of rows that are done: there is nothing in them yet."""
    columns = config.num_codebooks + 1
    state = GenerationState(
        cache=KVCache.create(config.backbone, batch, max_seq_len, dtype, num_lengths=batch),
        frame=jnp.zeros((batch, columns), jnp.int32),
        mask=jnp.zeros((batch, columns), bool),
        keys=jax.vmap(jax.random.key)(jnp.zeros((batch,), jnp.uint32)),
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
    *,
    config: CSMConfig,
    mesh: Mesh | None = None,
) -> GenerationState:
    """Reads a prompt into the cache of one row; `set_row` then lets it speak. Donates `state`.

    Args:
      frames, mask: [T, Q + 1], int32 and bool, padded on the right. The last row of a prompt
        need not be there: the first step feeds it.
      index: int32 [], the row of the batch.
    """
    model = bind(config, params)
    empty = KVCache.create(config.backbone, 1, len(frames), model.dtype, num_lengths=1)
    _, read = model.backbone(model.embed(frames[None], mask[None]), empty)

    def place(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, part, (index, 0, 0, 0))

    layers = jax.tree.map(place, state.cache.layers, read.layers)
    return keep_sharded(state._replace(cache=state.cache._replace(layers=layers)), mesh)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def set_row(
    state: GenerationState, index: Array, row: Row, *, mesh: Mesh | None = None
) -> GenerationState:
    """Lets one row of the batch go on from `row`. Donates `state`."""
    key = jax.random.key(row.seed)
    state = GenerationState(
        cache=state.cache._replace(lengths=state.cache.lengths.at[index].set(row.length)),
        frame=state.frame.at[index].set(row.frame),
        mask=state.mask.at[index].set(row.mask),
        keys=state.keys.at[index].set(key),
        num_frames=state.num_frames.at[index].set(row.num_frames),
        seen=state.seen.at[index].set(row.seen),
        done=state.done.at[index].set(row.done),
    )
    return keep_sharded(state, mesh)


@functools.partial(jax.jit, static_argnames=("config", "attended", "mesh"), donate_argnames="state")
def run_frames(
    params: Params,
    state: GenerationState,
    sampling: SamplingParams,
    num_frames: Array,
    pause: Array,
    *,
    config: CSMConfig,
    attended: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[GenerationState, Array, Array]:
    """Generates up to `num_frames` (at most `CHUNK_FRAMES`) frames, or until all rows end.

    `state` is donated: use the one returned.

    Args:
      pause: bool [], whether to stop as soon as any row ends.
      attended: as for `Llama.__call__`.

    Returns:
      The state; codes int32 [B, CHUNK_FRAMES, Q]; and how many of those frames were run.
    """
    model = bind(config, params)
    done_before = state.done

    def unfinished(carry: tuple[GenerationState, Array, Array]) -> Array:
        state, _, count = carry
        has_ended = jnp.any(state.done & ~done_before)
        return (count < num_frames) & ~jnp.all(state.done) & ~(pause & has_ended)

    def body(carry: tuple[GenerationState, Array, Array]):
        state, buffer, count = carry
        state, codes = frame_step(model, state, sampling, attended)
        buffer = jax.lax.dynamic_update_slice(buffer, codes[:, None], (0, count, 0))
        return state, buffer, count + 1

    buffer = jnp.zeros((len(state.done), CHUNK_FRAMES, config.num_codebooks), jnp.int32)
    carry = state, buffer, jnp.zeros((), jnp.int32)
    state, buffer, count = jax.lax.while_loop(unfinished, body, carry)
    return keep_sharded(state, mesh), buffer, count


class Utterance(NamedTuple):
    """One stretch of generation.

    Attributes:
      prompt: what the backbone reads first, frames int32 [T, Q + 1] and mask bool [T, Q + 1].
      sampling: how codes are drawn.
      seed: a whole number, of which the lowest 32 bits count.
      max_frames: it is over after so many frames.
    """

    prompt: Prompt
    sampling: Sampling
    seed: int
    max_frames: int


class Rewind(NamedTuple):
    """Where an utterance goes on from: `codes` [n, Q], its first frames, with another seed."""

    codes: np.ndarray
    seed: int


@dataclass
class _Occupant:
    """The utterance that a row of a batch is speaking, and its frames so far."""

    utterance: Utterance
    num_frames: int = 0

    @property
    def left(self) -> int:
        return self.utterance.max_frames - self.num_frames


class Batch:
    """Rows that speak side by side, and join and leave at frame borders.

    The one mutable thing of generation: it owns the state that the compiled functions pass on.
    Not thread-safe.

    Attributes:
      size: rows.
      max_seq_len: positions of a row, prompt and frames together.
    """

    def __init__(
        self,
        config: CSMConfig,
        params: Params,
        size: int,
        max_seq_len: int,
        mesh: Mesh | None = None,
    ):
        """Raises `InputError` if the data axis of `mesh`, where `params` lie, does not divide a
        size of more than 1."""
        check_rows(size, mesh)
        self.config = config
        self.size = size
        self.max_seq_len = max_seq_len
        self._params = params
        self._mesh = mesh
        self._state = init_state(
            config=config,
            batch=size,
            max_seq_len=max_seq_len,
            dtype=bind(config, params).dtype,
            mesh=mesh,
        )
        self._occupants: list[_Occupant | None] = [None] * size
        self._stack_sampling()

    def join(self, index: int, utterance: Utterance) -> None:
        """Reads the prompt of an utterance into a free row."""
        frames, mask = utterance.prompt
        if len(frames) + utterance.max_frames > self.max_seq_len:
            raise ValueError(
                f"{len(frames)} + {utterance.max_frames} positions in {self.max_seq_len}"
            )
        padded = min(bucket(len(frames)), self.max_seq_len)
        arguments = _pad(frames, padded), _pad(mask, padded), np.int32(index)
        self._state = prefill(
            self._params, self._state, *arguments, config=self.config, mesh=self._mesh
        )
        self._occupants[index] = _Occupant(utterance)
        self._stack_sampling()
        self.rewind(
            index, Rewind(np.zeros((0, self.config.num_codebooks), np.int32), utterance.seed)
        )

    def rewind(self, index: int, to: Rewind) -> None:
        """Lets a row go on from one of its own frames."""
        occupant, num_frames = self._occupants[index], len(to.codes)
        frames, mask = occupant.utterance.prompt
        frame, columns = frames[-1], mask[-1]
        if num_frames:
            frame = np.append(to.codes[-1], 0).astype(np.int32)
            columns = np.arange(len(frame)) < len(frame) - 1
        seen = np.zeros((self.config.audio_vocab_size,), bool)
        seen[to.codes[:, 0]] = True
        row = Row(
            length=np.int32(len(frames) - 1 + num_frames),
            frame=frame,
            mask=columns,
            seed=np.uint32(to.seed % 2**32),
            num_frames=np.int32(num_frames),
            seen=seen,
            done=np.bool_(False),
        )
        self._state = set_row(self._state, np.int32(index), row, mesh=self._mesh)
        occupant.num_frames = num_frames

    def leave(self, index: int) -> None:
        """Frees a row."""
        self._occupants[index] = None
        columns = self.config.num_codebooks + 1
        nothing = Row(
            length=np.int32(0),
            frame=np.zeros((columns,), np.int32),
            mask=np.zeros((columns,), bool),
            seed=np.uint32(0),
            num_frames=np.int32(0),
            seen=np.zeros((self.config.audio_vocab_size,), bool),
            done=np.bool_(True),
        )
        self._state = set_row(self._state, np.int32(index), nothing, mesh=self._mesh)
        self._stack_sampling()

    def run(self, num_frames: int, pause: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Up to `num_frames` frames of all rows; fewer if they end, or one is at its limit.

        Args:
          pause: stop as soon as any row ends.

        Returns:
          Codes int32 [B, n, Q], zeros from a row's end on; and bool [B], the rows that have ended.
        """
        occupants = [row for row in self._occupants if row]
        wanted = min(num_frames, CHUNK_FRAMES, *(row.left for row in occupants))
        self._state, codes, count = run_frames(
            self._params,
            self._state,
            self._sampling,
            np.int32(wanted),
            np.bool_(pause),
            config=self.config,
            attended=self._attended(),
            mesh=self._mesh,
        )
        codes, done, count = jax.device_get((codes, self._state.done, count))
        for row in occupants:
            row.num_frames += int(count)
        return codes[:, :count], done

    def wait(self) -> None:
        """Returns when everything asked for has been computed."""
        jax.block_until_ready(self._state)

    def _attended(self) -> int:
        """Positions that attention has to look at, by what the rows may come to."""
        ends = [
            len(row.utterance.prompt[0]) + row.utterance.max_frames
            for row in self._occupants
            if row
        ]
        return min(bucket(max(ends, default=1)), self.max_seq_len)

    def _stack_sampling(self) -> None:
        rows = [row.utterance.sampling if row else Sampling() for row in self._occupants]
        self._sampling = place_rows(SamplingParams.stack(rows), self._mesh)


def _pad(rows: np.ndarray, length: int) -> np.ndarray:
    return np.pad(rows, ((0, length - len(rows)), (0, 0)))


def bucket(length: int) -> int:
    """The next power of two, 32 at least: a handful of compiled shapes serve every length."""
    return max(32, 1 << (length - 1).bit_length())
