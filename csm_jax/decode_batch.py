"""A running batch: rows that speak side by side, around the compiled functions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from csm_jax.cache import KVCache
from csm_jax.compiling import Program, shape_of
from csm_jax.config import CSMConfig
from csm_jax.decode_step import (
    CHUNK_FRAMES,
    Params,
    Prompt,
    Row,
    init_state,
    prefill,
    read_prefix,
    run_frames,
    set_row,
)
from csm_jax.model import bind
from csm_jax.sampling import Sampling, SamplingParams
from csm_jax.sharding import check_rows, place_rows

# The shortest prompt that anything is compiled for.
MIN_BUCKET = 32
# Beginnings of prompts that are remembered, with their keys and values.
MAX_PREFIXES = 8


class Utterance(NamedTuple):
    """One stretch of generation.

    Attributes:
      prompt: what the backbone reads first, frames int32 [T, Q + 1] and mask bool [T, Q + 1].
      sampling: how codes are drawn.
      seed: a whole number, of which the lowest 32 bits count.
      max_frames: it is over after so many frames.
      num_shared: the positions at the beginning of the prompt that others begin with too: read on
        their own, and remembered. They are fewer than the prompt has.
    """

    prompt: Prompt
    sampling: Sampling
    seed: int
    max_frames: int
    num_shared: int = 0


class Rewind(NamedTuple):
    """Where an utterance goes on from: `codes` [n, Q], its first frames, with another seed."""

    codes: np.ndarray
    seed: int


@dataclass
class _Slot:
    """The utterance that a row of a batch is speaking, and its frames so far."""

    utterance: Utterance
    num_frames: int = 0

    @property
    def left(self) -> int:
        return self.utterance.max_frames - self.num_frames


class DecodeBatch:
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
        # Of which the shapes do not change: what the functions are compiled for.
        self._shapes = jax.tree.map(shape_of, self._state)
        self._slots: list[_Slot | None] = [None] * size
        self._prefixes: dict[bytes, KVCache] = {}
        self._stack_sampling()

    def programs(self) -> Iterator[Program]:
        """All programs that utterances of any length need which share nothing."""
        more = dict(config=self.config, mesh=self._mesh)
        index = np.int32(0)
        for length in buckets(self.max_seq_len):
            rows = self._empty(length)
            yield prefill, (self._params, self._shapes, *rows, index, None), more
            count, pause = np.int32(1), np.bool_(True)
            arguments = self._params, self._shapes, self._sampling, count, pause
            yield run_frames, arguments, more | dict(kv_length=length)
        yield set_row, (self._shapes, index, self._nothing()), dict(mesh=self._mesh)

    def prefix_programs(self, prefix_length: int) -> Iterator[Program]:
        """Programs for prompts after a shared prefix; reading the prefix is run here.

        Args:
          prefix_length: a `bucket` of `num_shared` positions, as utterances will have them.
        """
        more = dict(config=self.config, mesh=self._mesh)
        rows = self._empty(prefix_length)
        read = read_prefix(self._params, *rows, np.int32(1), config=self.config)
        prefix = jax.tree.map(shape_of, read)
        for length in buckets(self.max_seq_len):
            # Of both, more than half is not padding.
            if prefix_length // 2 + length // 2 < self.max_seq_len:
                rows = self._empty(length)
                yield prefill, (self._params, self._shapes, *rows, np.int32(0), prefix), more

    def _empty(self, length: int) -> Prompt:
        columns = self.config.num_codebooks + 1
        return np.zeros((length, columns), np.int32), np.zeros((length, columns), bool)

    def join(self, index: int, utterance: Utterance) -> None:
        """Reads the prompt of an utterance into a free row."""
        frames, mask = utterance.prompt
        if len(frames) + utterance.max_frames > self.max_seq_len:
            raise ValueError(
                f"{len(frames)} + {utterance.max_frames} positions in {self.max_seq_len}"
            )
        shared = utterance.num_shared
        prefix = self._prefix(frames[:shared], mask[:shared]) if shared else None
        rest = self._padded(frames[shared:], mask[shared:])
        self._state = prefill(
            self._params,
            self._state,
            *rest,
            np.int32(index),
            prefix,
            config=self.config,
            mesh=self._mesh,
        )
        self._slots[index] = _Slot(utterance)
        self._stack_sampling()
        self.rewind(
            index, Rewind(np.zeros((0, self.config.num_codebooks), np.int32), utterance.seed)
        )

    def rewind(self, index: int, to: Rewind) -> None:
        """Lets a row go on from one of its own frames."""
        slot, num_frames = self._slots[index], len(to.codes)
        frames, mask = slot.utterance.prompt
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
        slot.num_frames = num_frames

    def leave(self, index: int) -> None:
        """Frees a row."""
        self._slots[index] = None
        self._state = set_row(self._state, np.int32(index), self._nothing(), mesh=self._mesh)
        self._stack_sampling()

    def _nothing(self) -> Row:
        """What a row without an utterance goes on from."""
        columns = self.config.num_codebooks + 1
        return Row(
            length=np.int32(0),
            frame=np.zeros((columns,), np.int32),
            mask=np.zeros((columns,), bool),
            seed=np.uint32(0),
            num_frames=np.int32(0),
            seen=np.zeros((self.config.audio_vocab_size,), bool),
            done=np.bool_(True),
        )

    def run(self, num_frames: int, pause: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Up to `num_frames` frames of all rows; fewer if they end, or one is at its limit.

        Args:
          pause: stop as soon as any row ends.

        Returns:
          Codes int32 [B, n, Q], zeros from a row's end on; and bool [B], the rows that have ended.
        """
        taken = [row for row in self._slots if row]
        wanted = min(num_frames, CHUNK_FRAMES, *(row.left for row in taken))
        self._state, codes, count = run_frames(
            self._params,
            self._state,
            self._sampling,
            np.int32(wanted),
            np.bool_(pause),
            config=self.config,
            kv_length=self._kv_length(),
            mesh=self._mesh,
        )
        codes, done, count = jax.device_get((codes, self._state.done, count))
        for row in taken:
            row.num_frames += int(count)
        return codes[:, :count], done

    def wait(self) -> None:
        """Returns when everything asked for has been computed."""
        jax.block_until_ready(self._state)

    def _prefix(self, frames: np.ndarray, mask: np.ndarray) -> KVCache:
        """What prompts begin with, read now or not long ago."""
        key = frames.tobytes() + mask.tobytes()
        prefix = self._prefixes.pop(key, None)
        if prefix is None:
            length = np.int32(len(frames))
            rows = self._padded(frames, mask)
            prefix = read_prefix(self._params, *rows, length, config=self.config)
        self._prefixes[key] = prefix  # as the youngest
        if len(self._prefixes) > MAX_PREFIXES:
            del self._prefixes[next(iter(self._prefixes))]
        return prefix

    def _padded(self, frames: np.ndarray, mask: np.ndarray) -> Prompt:
        length = self.bucket(len(frames))
        return _pad(frames, length), _pad(mask, length)

    def bucket(self, length: int) -> int:
        """Positions that so many are padded to."""
        return min(bucket(length), self.max_seq_len)

    def _kv_length(self) -> int:
        """Positions that attention has to look at, by what the rows may come to."""
        ends = [
            len(row.utterance.prompt[0]) + row.utterance.max_frames for row in self._slots if row
        ]
        return self.bucket(max(ends, default=1))

    def _stack_sampling(self) -> None:
        rows = [row.utterance.sampling if row else Sampling() for row in self._slots]
        self._sampling = place_rows(SamplingParams.stack(rows), self._mesh)


def _pad(rows: np.ndarray, length: int) -> np.ndarray:
    return np.pad(rows, ((0, length - len(rows)), (0, 0)))


def bucket(length: int) -> int:
    """The next power of two: a handful of compiled shapes serve every length."""
    return max(MIN_BUCKET, 1 << (length - 1).bit_length())


def buckets(max_seq_len: int) -> Iterator[int]:
    """All lengths that `bucket` gives where there are so many positions."""
    length = 0
    while length < max_seq_len:
        length = min(bucket(length + 1), max_seq_len)
        yield length
