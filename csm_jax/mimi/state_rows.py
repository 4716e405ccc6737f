"""The states of a batch of unrelated streams, row by row.

Attention caches are most of a state, and are never copied: their rows are chosen by length alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from csm_jax.mimi.conv import Array, State
from csm_jax.model.kv_cache import WindowCache


def restart(rows: Array, state: State, initial: State) -> State:
    """The state with the rows [B] that are True as they are initially."""

    def choose(leaf: Any, new: Any) -> Any:
        if isinstance(leaf, WindowCache):
            return leaf.restart(rows)
        return _choose(rows, new, leaf)

    return jax.tree.map(choose, state, initial, is_leaf=_is_window_cache)


def keep(rows: Array, state: State, before: State) -> State:
    """The state with the rows [B] that are False as they were `before`."""

    def choose(leaf: Any, old: Any) -> Any:
        if isinstance(leaf, WindowCache):
            return leaf.keep(rows, old)
        return _choose(rows, leaf, old)

    return jax.tree.map(choose, state, before, is_leaf=_is_window_cache)


def _is_window_cache(node: Any) -> bool:
    return isinstance(node, WindowCache)


def _choose(rows: Array, leaf: Array, other: Array) -> Array:
    """`leaf` in the rows [B] that are True, `other` in the rest."""
    return jnp.where(jax.lax.expand_dims(rows, range(1, leaf.ndim)), leaf, other)
