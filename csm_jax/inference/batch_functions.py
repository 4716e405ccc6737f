"""The functions of logits that the utterances of a batch have, and the states of its rows.

A function is part of the compiled loop. So each is there once, however many rows it is applied to,
and stays at its place while any of them has it.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from csm_jax.inference.interventions import LogitsFunction
from csm_jax.inference.utterance import Utterance
from csm_jax.model.logits_functions import Call, CallRows, Calls, CallStates
from csm_jax.model.sharding import place_rows


class _Table:
    """The functions of one kind."""

    def __init__(self, size: int, mesh: Mesh | None):
        self._size = size
        self._mesh = mesh
        self._functions: dict[Hashable, LogitsFunction] = {}
        self.is_on: tuple[np.ndarray, ...] = ()

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(each.function for each in self._functions.values())

    def update(
        self, rows: Sequence[LogitsFunction | None], states: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Takes the functions of all rows; returns their states, those there were included."""
        before = dict(zip(self._functions, states, strict=True))
        names = [None if row is None else _name(row) for row in rows]
        wanted = {name: row for name, row in zip(names, rows, strict=True) if row and name}
        kept = {name: each for name, each in self._functions.items() if name in wanted}
        self._functions = kept | {name: wanted[name] for name in wanted if name not in kept}
        self.is_on = tuple(np.asarray([each == name for each in names]) for name in self._functions)
        return tuple(
            before[name] if name in before else self._stacked(each.state)
            for name, each in self._functions.items()
        )

    def states_of(self, function: LogitsFunction | None) -> tuple[Any, ...]:
        """The states at the beginning of a row that has one of the functions, or none."""
        name = None if function is None else _name(function)
        return tuple(
            function.state if function and each == name else other.state
            for each, other in self._functions.items()
        )

    def _stacked(self, state: Any) -> Any:
        """A state as that of all rows; each is set again when an utterance joins it."""
        rows = jax.tree.map(lambda leaf: jnp.stack([leaf] * self._size), state)
        return place_rows(rows, self._mesh)


class BatchFunctions:
    """The functions of codebook 0 and of the other codebooks of a batch."""

    def __init__(self, size: int, mesh: Mesh | None):
        self._first, self._rest = _Table(size, mesh), _Table(size, mesh)

    @property
    def calls(self) -> Calls:
        """What is compiled."""
        return Calls(self._first.calls, self._rest.calls)

    @property
    def rows(self) -> CallRows:
        """The rows that each function is applied to."""
        return CallRows(self._first.is_on, self._rest.is_on)

    def update(self, rows: Sequence[Utterance | None], states: CallStates) -> CallStates:
        """Takes the functions of the utterances of all rows, None in free ones.

        Args:
          states: those of all rows until now.

        Returns:
          Those of all rows from now on.
        """
        return CallStates(
            self._first.update([row.logits if row else None for row in rows], states.first),
            self._rest.update([row.depth_logits if row else None for row in rows], states.rest),
        )

    def states_of(self, row: Utterance | None) -> CallStates:
        """The states at the beginning of a row."""
        return CallStates(
            self._first.states_of(row.logits if row else None),
            self._rest.states_of(row.depth_logits if row else None),
        )


def _name(function: LogitsFunction) -> Hashable:
    """What two functions have in common that can be compiled as one."""
    leaves, structure = jax.tree.flatten(function.state)
    return function.function, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
