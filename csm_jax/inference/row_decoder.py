"""Decodes the code streams of all rows of a batch."""

import functools
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from csm_jax.inference.frame_blocks import block_sizes
from csm_jax.mimi.codec import Codec
from csm_jax.mimi.conv import Array, State
from csm_jax.model.compiling import Program, shape_of


def rows_together(num_rows: int) -> int:
    """How many rows the codec should decode in one call.

    On a GPU or TPU eight rows take hardly longer than one. On a CPU two take less than twice as
    long, and one of two about as long as one alone; of more, idle rows cost more than is won.
    """
    return math.gcd(num_rows, 2) if jax.default_backend() == "cpu" else num_rows


@jax.jit
def _take(states: State, index: Array) -> State:
    """The state of one stream of a group."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), states)


@functools.partial(jax.jit, donate_argnums=0)
def _put(states: State, state: State, index: Array) -> State:
    """The states of a group, one of them replaced."""

    def put(leaf: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, part, index, 0)

    return jax.tree.map(put, states, state)


class RowDecoder:
    """Decodes a stream of codes in every row of a batch; streams can move to other rows."""

    def __init__(self, codec: Codec, num_rows: int, together: int):
        """Creates the state of all rows.

        Args:
          together: how many rows are decoded in one call; a divisor of `num_rows`.
        """
        self._codec = codec
        self._groups = np.arange(num_rows).reshape(-1, together)
        self._states = [codec.decode_stream_state(together) for _ in self._groups]
        self._is_new = np.ones(num_rows, bool)

    def take(self, row: int) -> State | None:
        """The state of a row's stream, for `resume`; None if it has not started."""
        group, index = divmod(row, self._groups.shape[1])
        return None if self._is_new[row] else _take(self._states[group], np.int32(index))

    def resume(self, row: int, state: State | None) -> None:
        """Continues a stream in any row from a state of `take`; None begins a new stream."""
        self._is_new[row] = state is None
        if state is not None:
            group, index = divmod(row, self._groups.shape[1])
            self._states[group] = _put(self._states[group], state, np.int32(index))

    def programs(self, num_codebooks: int) -> Iterator[Program]:
        """All programs that streams of codes [F, num_codebooks] need, for `compile_all`."""
        state, one = (
            jax.tree.map(shape_of, self._codec.decode_stream_state(count))
            for count in (self._groups.shape[1], 1)
        )
        yield _take, (state, np.int32(0)), {}
        yield _put, (state, one, np.int32(0)), {}
        for size in block_sizes():
            yield self._codec.rows_program(size, num_codebooks, state)

    def decode(self, blocks: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Continues the streams of some rows.

        Args:
          blocks: codes int32 [F, Q] by row, with the same F for all.

        Returns:
          float32 [F * frame_size] by row.
        """
        nothing = np.zeros_like(next(iter(blocks.values())))
        audio = {}
        for i, group in enumerate(self._groups):
            active = np.isin(group, list(blocks))
            if not active.any():
                continue
            codes = np.stack([blocks.get(row, nothing) for row in group])
            samples, self._states[i] = self._codec.decode_rows(
                codes, self._states[i], active, restart=active & self._is_new[group]
            )
            self._is_new[group[active]] = False
            audio.update(zip(group[active].tolist(), np.asarray(samples)[active], strict=True))
        return audio
