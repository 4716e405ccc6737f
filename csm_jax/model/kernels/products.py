"""The kernels whose work is a product of rows with matrices.

They round where the plain path (`llama.Block`) rounds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from csm_jax.model.kernels.blocks import (
    Matrix,
    Ref,
    Span,
    WeightRef,
    load,
    normed_rows,
    output_block,
    products,
    program_span,
    row_block,
    span,
    store,
)
from csm_jax.model.kernels.launch import launch, shape_of, size_of
from csm_jax.model.layers import Adapted, AnyArray, Array, Int8Weight, RMSNorm, Weight


class Positions(NamedTuple):
    """Where the new positions of a call are.

    Attributes:
      start: int32 [B], or [1] for all rows alike, of each row's first one.
      length: T, how many positions each row has.
    """

    start: Array
    length: int


def product_and_residual(x: Array, weight: Weight, residual: Array) -> Array:
    """The product of rows [rows, in] with a matrix [out, in], and the residual [rows, out]."""
    num_rows = row_block(len(x))
    num_outputs = output_block(num_rows)
    return launch(
        _product_and_residual,
        (pl.cdiv(residual.shape[1], num_outputs), pl.cdiv(len(x), num_rows)),
        shape_of(residual),
        x,
        weight,
        residual,
        sizes=(num_rows, num_outputs),
    )


def _product_and_residual(
    x: Ref, weight: WeightRef, residual: Ref, output: Ref, *, sizes: tuple[int, int]
) -> None:
    num_rows, num_outputs = sizes
    rows = program_span(1, num_rows, x.shape[0])
    outputs = program_span(0, num_outputs, output.shape[1])
    matrices = [Matrix(weight, outputs)]
    (total,) = products(lambda columns: load(x, rows, columns), matrices, x.shape[1], num_rows)
    store(output, load(residual, rows, outputs) + total.astype(output.dtype), rows, outputs)


def gated_units(x: Array, norm: RMSNorm, gate: Weight, up: Weight) -> Array:
    """Norm, products with gate and up, and SwiGLU: [rows, F]."""
    num_rows = row_block(len(x))
    num_outputs = output_block(num_rows)
    width = _matrix_of(gate).shape[0]
    return launch(
        _gated_units,
        (pl.cdiv(width, num_outputs), pl.cdiv(len(x), num_rows)),
        jax.ShapeDtypeStruct((len(x), width), x.dtype),
        x,
        norm.scale[...],
        gate,
        up,
        eps=norm.eps,
        sizes=(num_rows, num_outputs),
    )


def _gated_units(
    x: Ref,
    scale: Ref,
    gate: WeightRef,
    up: WeightRef,
    output: Ref,
    *,
    eps: float,
    sizes: tuple[int, int],
) -> None:
    num_rows, num_outputs = sizes
    rows = program_span(1, num_rows, x.shape[0])
    outputs = program_span(0, num_outputs, output.shape[1])
    matrices = [Matrix(gate, outputs), Matrix(up, outputs)]
    values = products(normed_rows(x, scale, rows, eps), matrices, x.shape[1], num_rows)
    gates, ups = (value.astype(output.dtype) for value in values)
    opened = jax.nn.sigmoid(gates.astype(jnp.float32)).astype(output.dtype)
    store(output, gates * opened * ups, rows, outputs)


def normed_logits(
    x: Array, norm: RMSNorm, heads: Weight, positions: Positions
) -> tuple[Array, Array]:
    """Norm of each row's last position p, and product with matrix p - 1 of a stack [Q, V, D].

    Returns:
      Logits, float32 [B, V]; and the positions after, int32 [1].
    """
    batch = len(x) // positions.length
    num_rows = row_block(batch)
    num_outputs = output_block(num_rows)
    width = _matrix_of(heads).shape[1]
    return launch(
        _normed_logits,
        (pl.cdiv(width, num_outputs), pl.cdiv(batch, num_rows)),
        (jax.ShapeDtypeStruct((batch, width), jnp.float32), shape_of(positions.start)),
        x,
        norm.scale[...],
        heads,
        positions.start,
        bytes_moved=size_of(x, heads) // _matrix_of(heads).shape[0],
        eps=norm.eps,
        length=positions.length,
        sizes=(num_rows, num_outputs),
    )


def _normed_logits(
    x: Ref,
    scale: Ref,
    heads: WeightRef,
    start: Ref,
    output: Ref,
    end: Ref,
    *,
    eps: float,
    length: int,
    sizes: tuple[int, int],
) -> None:
    num_rows, num_outputs = sizes
    rows = program_span(1, num_rows, output.shape[0])
    outputs = program_span(0, num_outputs, output.shape[1])
    last = Span(rows.ids * length + length - 1, rows.exist)
    first = span(0, 1, 1)
    after = load(start, first) + length
    matrices = [Matrix(heads, outputs, after - 2)]
    (total,) = products(normed_rows(x, scale, last, eps), matrices, x.shape[1], num_rows)
    store(output, total, rows, outputs)
    # Every program writes the same number.
    store(end, after, first)


def embedded_product(
    code: Array, table: Array, weight: Weight, codebook: Array, vocabulary: int
) -> Array:
    """The product of embeddings with a matrix [out, in]: [rows, out].

    Args:
      code: int32 [rows].
      table: [Q * V, in], row `code + (codebook - 1) * vocabulary`.
      codebook: int32 [1].
    """
    num_rows = row_block(len(code))
    num_outputs = output_block(num_rows)
    width = _matrix_of(weight).shape[0]
    return launch(
        _embedded_product,
        (pl.cdiv(width, num_outputs), pl.cdiv(len(code), num_rows)),
        jax.ShapeDtypeStruct((len(code), width), table.dtype),
        code,
        table,
        weight,
        codebook,
        bytes_moved=size_of(weight) + len(code) * size_of(table) // len(table),
        vocabulary=vocabulary,
        sizes=(num_rows, num_outputs),
    )


def _embedded_product(
    code: Ref,
    table: Ref,
    weight: WeightRef,
    codebook: Ref,
    output: Ref,
    *,
    vocabulary: int,
    sizes: tuple[int, int],
) -> None:
    num_rows, num_outputs = sizes
    rows = program_span(1, num_rows, code.shape[0])
    outputs = program_span(0, num_outputs, output.shape[1])
    first = (load(codebook, span(0, 1, 1)) - 1) * vocabulary
    entries = Span(load(code, rows) + first, rows.exist)
    matrices = [Matrix(weight, outputs)]
    length = table.shape[1]
    (total,) = products(lambda columns: load(table, entries, columns), matrices, length, num_rows)
    store(output, total, rows, outputs)


def _matrix_of(weight: Weight) -> AnyArray:
    if isinstance(weight, Adapted):
        raise ValueError("the fused kernels take no adapters beside a matrix: merge them")
    return weight.values if isinstance(weight, Int8Weight) else weight
