"""What the kernels are made of: blocks of arrays, and sums of products over them.

A program of a kernel's grid computes a block of outputs for a block of rows. Triton's blocks have
sizes that are powers of two, so every access has a mask; what is outside an array reads as zero.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from csm_jax.model.layers import Array, Int8Weight

# A reference to an array in the card's memory, which Pallas has no public type for.
Ref = Any
# A reference to a matrix or to a stack of them; of int8, a pair of references.
WeightRef = Any

# Rows of a program at most; and at least, where there are several: Triton's products have 16.
_MOST_ROWS, _FEWEST_ROWS = 64, 16
# Columns of a matrix that a program multiplies at once, with one row and with several.
_COLUMNS_OF_ONE_ROW, _COLUMNS = 1024, 128


class Span(NamedTuple):
    """Places along an axis: their numbers, int32 [size], and which of them exist, bool [size]."""

    ids: Array
    exist: Array


class Matrix(NamedTuple):
    """A matrix [out, in] that a program multiplies a part of.

    Attributes:
      weight: refers to it, or to a stack that has it.
      outputs: which of its rows.
      stack_index: int32 [1], which of the stack; None where there is none.
    """

    weight: WeightRef
    outputs: Span
    stack_index: Array | None = None


def span(start: Array | int, size: int, limit: int) -> Span:
    """`size` places from `start` on, of an axis of length `limit`."""
    ids = start + jnp.arange(size, dtype=jnp.int32)
    return Span(ids, ids < limit)


def program_span(axis: int, size: int, limit: int) -> Span:
    """The places of this program, where the grid divides an axis into blocks."""
    return span(pl.program_id(axis) * size, size, limit)


def load(ref: Ref, *axes: Span) -> Array:
    """The block of an array that has these places along its axes."""
    return load_at(ref, _indices(axes), _mask(axes))


def store(ref: Ref, values: Array, *axes: Span) -> None:
    """Writes a block, rounded to the type of the array."""
    store_at(ref, values, _indices(axes), _mask(axes))


def load_at(ref: Ref, indices: Sequence[Array], mask: Array) -> Array:
    """Entries of an array, in the shape that indices and mask have when they are broadcast."""
    mask = jnp.broadcast_to(mask, jnp.broadcast_shapes(mask.shape, *(x.shape for x in indices)))
    return triton.load(ref.at[tuple(indices)], mask=mask, other=jnp.zeros(mask.shape, ref.dtype))


def store_at(ref: Ref, values: Array, indices: Sequence[Array], mask: Array) -> None:
    """Writes entries of an array, rounded to its type."""
    mask = jnp.broadcast_to(mask, values.shape)
    # Interpreted, what is masked is written as it was, over what another entry writes there.
    first = jnp.where(mask, jnp.broadcast_to(indices[0], values.shape), ref.shape[0])
    triton.store(ref.at[(first, *indices[1:])], values.astype(ref.dtype), mask=mask)


def _indices(axes: Sequence[Span]) -> list[Array]:
    return [_along(axis.ids, place, len(axes)) for place, axis in enumerate(axes)]


def _mask(axes: Sequence[Span]) -> Array:
    masks = [_along(axis.exist, place, len(axes)) for place, axis in enumerate(axes)]
    return functools.reduce(jnp.logical_and, masks)


def _along(vector: Array, place: int, rank: int) -> Array:
    return jax.lax.expand_dims(vector, [axis for axis in range(rank) if axis != place])


def row_block(num_rows: int) -> int:
    """How many rows a program computes."""
    if num_rows == 1:
        return 1
    return min(_MOST_ROWS, max(_FEWEST_ROWS, pl.next_power_of_2(num_rows)))


def output_block(num_rows: int, pairs: bool = False) -> int:
    """How many outputs a program computes, or pairs of them: a card needs hundreds of programs."""
    if num_rows > 1:
        return 16
    return 4 if pairs else 8


def normed_rows(x: Ref, scale: Ref, rows: Span, eps: float) -> Callable[[Span], Array]:
    """A function that loads columns of `RMSNorm(x)` of some rows of x [rows, D]."""
    length = x.shape[1]
    size = min(_COLUMNS_OF_ONE_ROW, pl.next_power_of_2(length))

    def add_squares(block: Array, total: Array) -> Array:
        values = load(x, rows, span(block * size, size, length)).astype(jnp.float32)
        return total + jnp.sum(values * values, axis=1)

    start = jnp.zeros(rows.ids.shape, jnp.float32)
    total = jax.lax.fori_loop(np.int32(0), np.int32(pl.cdiv(length, size)), add_squares, start)
    inverse = jax.lax.rsqrt(total / length + eps)

    def load_columns(columns: Span) -> Array:
        # Rounded where the plain norm rounds.
        values = load(x, rows, columns).astype(jnp.float32) * inverse[:, None]
        return values.astype(x.dtype) * load(scale, columns)[None]

    return load_columns


def products(
    load_columns: Callable[[Span], Array], matrices: Sequence[Matrix], length: int, num_rows: int
) -> list[Array]:
    """Products of rows with matrices, each float32 [rows, outputs].

    Args:
      load_columns: loads columns of the rows, [rows, columns].
      length: of the rows.
      num_rows: as `row_block` returns it. Of one row the products are sums, since the units for
        matrices would multiply 15 others for it.
    """
    size = min(_COLUMNS_OF_ONE_ROW if num_rows == 1 else _COLUMNS, pl.next_power_of_2(length))
    size = max(size, _FEWEST_ROWS)

    def add(block: Array, totals: list[Array]) -> list[Array]:
        columns = span(block * size, size, length)
        values = load_columns(columns)
        return [
            total + _multiply(values, load_weight(matrix, columns), num_rows)
            for total, matrix in zip(totals, matrices, strict=True)
        ]

    def start(matrix: Matrix) -> Array:
        count = len(matrix.outputs.ids)
        return jnp.zeros((count, size) if num_rows == 1 else (num_rows, count), jnp.float32)

    num_blocks = np.int32(pl.cdiv(length, size))
    totals = [start(matrix) for matrix in matrices]
    totals = jax.lax.fori_loop(np.int32(0), num_blocks, add, totals)
    if num_rows == 1:
        totals = [jnp.sum(total, axis=1)[None] for total in totals]
    return [scaled(total, matrix) for total, matrix in zip(totals, matrices, strict=True)]


def _multiply(values: Array, weight: Array, num_rows: int) -> Array:
    if num_rows == 1:
        return values.astype(jnp.float32) * weight.astype(jnp.float32)
    return jax.lax.dot_general(
        values,
        weight.astype(values.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def load_weight(matrix: Matrix, columns: Span) -> Array:
    """Columns of the outputs of a matrix, [outputs, columns], as it is stored."""
    weight = matrix.weight
    return _load_part(weight.values if isinstance(weight, Int8Weight) else weight, matrix, columns)


def scaled(total: Array, matrix: Matrix) -> Array:
    """Sums [rows, outputs] of products with a matrix, times its scale if it has one."""
    if not isinstance(matrix.weight, Int8Weight):
        return total
    return total * _load_part(matrix.weight.scale, matrix)[None]


def _load_part(ref: Ref, matrix: Matrix, *axes: Span) -> Array:
    if matrix.stack_index is None:
        return load(ref, matrix.outputs, *axes)
    index = Span(matrix.stack_index, jnp.ones((1,), bool))
    return jnp.squeeze(load(ref, index, matrix.outputs, *axes), axis=0)
