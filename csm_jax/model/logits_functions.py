"""Functions of a user's that change logits inside the compiled frame loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from csm_jax.model.layers import AnyArray, Array


class CodeStep(NamedTuple):
    """Which code of a row is about to be drawn.

    Attributes:
      frame: int32 [], from 0 at the beginning of each part of a text.
      codebook: int32 [].
      codes: int32 [Q], of this frame so far; -1 for those that are not drawn yet.
      previous: int32 [Q], of the frame before; -1 in the first frame.
    """

    frame: Array
    codebook: Array
    codes: Array
    previous: Array


# (logits float32 [V], state, step) -> (logits, state), of one row. A state is a pytree of arrays.
Call = Callable[[Array, Any, CodeStep], tuple[Array, Any]]


class Calls(NamedTuple):
    """The functions of a batch: those of codebook 0, and those of the codebooks after it."""

    first: tuple[Call, ...] = ()
    rest: tuple[Call, ...] = ()


class CallStates(NamedTuple):
    """The states of `Calls`: pytrees [B, ...]."""

    first: tuple[Any, ...] = ()
    rest: tuple[Any, ...] = ()


class CallRows(NamedTuple):
    """The rows that each of `Calls` is applied to: bool [B]."""

    first: tuple[AnyArray, ...] = ()
    rest: tuple[AnyArray, ...] = ()


NO_CALLS, NO_STATES, NO_ROWS = Calls(), CallStates(), CallRows()


class FrameFunctions(NamedTuple):
    """The functions of a batch at one frame of each row.

    Attributes:
      calls, rows: the functions, and where they are applied.
      frame: int32 [B].
      previous: int32 [B, Q].
    """

    calls: Calls
    rows: CallRows
    frame: Array
    previous: Array

    def apply_first(self, logits: Array, states: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
        """Logits [B, V] of codebook 0, and the new states of its functions."""
        if not self.calls.first:
            return logits, ()
        step = self._step(jnp.int32(0), self.no_codes())
        return _apply(self.calls.first, self.rows.first, logits, states, step)

    def apply_rest(
        self, logits: Array, states: tuple[Any, ...], codebook: Array, codes: Array | None
    ) -> tuple[Array, tuple[Any, ...]]:
        """The same of another codebook, after codes [B, Q] of this frame."""
        if codes is None:
            return logits, ()
        return _apply(self.calls.rest, self.rows.rest, logits, states, self._step(codebook, codes))

    def no_codes(self) -> Array:
        """The codes of a frame of which none is drawn, [B, Q]."""
        return jnp.full_like(self.previous, -1)

    def _step(self, codebook: Array, codes: Array) -> CodeStep:
        codebooks = jnp.broadcast_to(codebook, self.frame.shape)
        return CodeStep(self.frame, codebooks, codes, self.previous)


def _apply(
    calls: tuple[Call, ...],
    rows: tuple[AnyArray, ...],
    logits: Array,
    states: tuple[Any, ...],
    step: CodeStep,
) -> tuple[Array, tuple[Any, ...]]:
    """Every function is computed for all rows, and taken where it belongs."""
    new_states = []
    for call, is_on, state in zip(calls, rows, states, strict=True):
        changed, new_state = jax.vmap(call)(logits, state, step)
        logits = jnp.where(jnp.asarray(is_on)[:, None], changed, logits)
        new_states.append(new_state)
    return logits, tuple(new_states)
