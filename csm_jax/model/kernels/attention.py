"""The kernels of an attention layer, for a few new positions of each row.

Each takes and returns activations [B * T, D], of T positions of each of B rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from csm_jax.config import LlamaConfig
from csm_jax.model.kernels.blocks import (
    Matrix,
    Ref,
    Span,
    WeightRef,
    load,
    load_at,
    normed_rows,
    output_block,
    products,
    program_span,
    row_block,
    scaled,
    span,
    store,
    store_at,
)
from csm_jax.model.kernels.launch import launch, shape_of, size_of
from csm_jax.model.kernels.products import Positions, product_and_residual
from csm_jax.model.kv_cache import LayerCache
from csm_jax.model.layers import (
    SHORT,
    Array,
    Int8Weight,
    RMSNorm,
    Weight,
    rope_frequencies,
)

# Rows at most for which every program of the output projection computes the attention again.
_FEW_ROWS = 2
# Products of queries and keys that a program holds at once.
_MOST_PRODUCTS = 1 << 14


def turns(config: LlamaConfig, limit: int) -> np.ndarray:
    """Cosines and sines of RoPE for positions below `limit`, float32 [2, limit, H/2]."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = np.arange(limit, dtype=np.float32)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)])


def normed_qkv(
    x: Array,
    norm: RMSNorm,
    weight: Weight,
    cache: LayerCache,
    positions: Positions,
    config: LlamaConfig,
) -> tuple[Array, LayerCache]:
    """Norm, product with `attn.qkv`, and RoPE: the queries, and a cache with the new positions.

    Returns:
      [B * T, N * H]; and the cache, updated in place where the caller gives it up.
    """
    num_rows = row_block(len(x))
    num_pairs = output_block(num_rows, pairs=True)
    num_heads = 2 * config.num_kv_heads + config.num_heads
    grid = pl.cdiv(num_heads * config.head_dim // 2, num_pairs), pl.cdiv(len(x), num_rows)
    query = jax.ShapeDtypeStruct((len(x), config.num_heads * config.head_dim), x.dtype)
    return launch(
        _normed_qkv,
        grid,
        (query, jax.tree.map(shape_of, cache)),
        cache,
        x,
        norm.scale[...],
        weight,
        positions.start,
        turns(config, cache.value.shape[3]),
        in_place=2,
        bytes_moved=size_of(x, weight, query),
        config=config,
        length=positions.length,
        sizes=(num_rows, num_pairs),
    )


def _normed_qkv(
    _: LayerCache,
    x: Ref,
    scale: Ref,
    weight: WeightRef,
    start: Ref,
    turns: Ref,
    query: Ref,
    cache: LayerCache,
    *,
    config: LlamaConfig,
    length: int,
    sizes: tuple[int, int],
) -> None:
    """Computes both halves of some pairs of dimensions; `qkv.py` tells the order of the rows."""
    num_rows, num_pairs = sizes
    half, group = config.head_dim // 2, config.num_heads // config.num_kv_heads
    rows = program_span(1, num_rows, x.shape[0])
    pairs = program_span(0, num_pairs, config.num_kv_heads * (group + 2) * half)
    head, place = _divided(pairs.ids, half)
    kv_head, member = _divided(head, group + 2)
    batch, position = _places(rows, start, length)

    load_columns = normed_rows(x, scale, rows, config.norm_eps)
    halves = [place, place + half]
    outputs = [Span(head * config.head_dim + at, pairs.exist) for at in halves]
    matrices = [Matrix(weight, each) for each in outputs]
    values = products(load_columns, matrices, x.shape[1], num_rows)
    left, right = (value.astype(x.dtype).astype(jnp.float32) for value in values)

    # A row that has no room left is one that has ended.
    exist = (rows.exist & (position < cache.value.shape[3]))[:, None] & pairs.exist[None]
    cos, sin = (
        load_at(turns, (jnp.full((1, 1), index, jnp.int32), position[:, None], place[None]), exist)
        for index in (0, 1)
    )
    is_value = member[None] == group + 1
    cos, sin = jnp.where(is_value, 1.0, cos), jnp.where(is_value, 0.0, sin)
    rotated = left * cos - right * sin, right * cos + left * sin
    for at, result in zip(halves, rotated, strict=True):
        columns = (kv_head * group + member) * config.head_dim + at
        store(query, result, rows, Span(columns, pairs.exist & (member < group)))
        row, kv, dim, slot = batch[:, None], kv_head[None], at[None], position[:, None]
        place = row, kv, dim, slot
        store_at(cache.key, result, place, exist & (member[None] == group))
        store_at(cache.value, result, place, exist & is_value)


def attention_output(
    query: Array,
    cache: LayerCache,
    weight: Weight,
    residual: Array,
    positions: Positions,
    config: LlamaConfig,
) -> Array:
    """Attention, the product with `attn.o`, and the residual: [B * T, D].

    Of few rows with a short cache, every program computes the attention again, which takes about
    as long as another launch.
    """
    if len(query) > _FEW_ROWS or cache.value.shape[3] > SHORT:
        mixed = attention(query, cache, positions, config)
        return product_and_residual(mixed, weight, residual)
    num_outputs = output_block(1)
    return launch(
        _attention_output,
        (pl.cdiv(residual.shape[1], num_outputs),),
        shape_of(residual),
        query,
        cache,
        weight,
        residual,
        positions.start,
        num_warps=8,
        config=config,
        length=positions.length,
        num_outputs=num_outputs,
    )


def _attention_output(
    query: Ref,
    cache: LayerCache,
    weight: WeightRef,
    residual: Ref,
    start: Ref,
    output: Ref,
    *,
    config: LlamaConfig,
    length: int,
    num_outputs: int,
) -> None:
    outputs = program_span(0, num_outputs, output.shape[1])
    matrix = Matrix(weight, outputs)
    for index in range(output.shape[0]):
        row = span(index, 1, output.shape[0])
        batch, position = _places(row, start, length)
        batch_row = Span(batch, row.exist)
        total = jnp.zeros((num_outputs,), jnp.float32)
        for head in range(config.num_kv_heads):
            columns, mixed = _attend(query, cache, row, batch_row, position, head, config)
            part = _load_heads(matrix, columns).astype(jnp.float32)  # [outputs, G, H]
            total += jnp.sum(part * mixed.astype(jnp.float32)[None], axis=(1, 2))
        product = scaled(total[None], matrix).astype(output.dtype)
        store(output, load(residual, row, outputs) + product, row, outputs)


def attention(query: Array, cache: LayerCache, positions: Positions, config: LlamaConfig) -> Array:
    """Attention of every row, [B * T, N * H]."""
    return launch(
        _attention,
        (len(query), config.num_kv_heads),
        shape_of(query),
        query,
        cache,
        positions.start,
        num_warps=8,
        config=config,
        length=positions.length,
    )


def _attention(
    query: Ref,
    cache: LayerCache,
    start: Ref,
    output: Ref,
    *,
    config: LlamaConfig,
    length: int,
) -> None:
    row = program_span(0, 1, query.shape[0])
    batch, position = _places(row, start, length)
    kv_head = pl.program_id(1)
    columns, mixed = _attend(query, cache, row, Span(batch, row.exist), position, kv_head, config)
    ids = jnp.broadcast_to(columns.ids, mixed.shape)
    store_at(output, mixed, (jnp.broadcast_to(row.ids[:, None], mixed.shape), ids), columns.exist)


def _attend(
    query: Ref,
    cache: LayerCache,
    row: Span,
    batch: Span,
    position: Array,
    kv_head: Array | int,
    config: LlamaConfig,
) -> tuple[Span, Array]:
    """Attention of the queries of one row and one kv head, over blocks of positions.

    Returns:
      The columns of `query` that they are, [G, H] (padded); and their mixed values, [G, H].
    """
    group, capacity = config.num_heads // config.num_kv_heads, cache.value.shape[3]
    members = span(0, pl.next_power_of_2(group), group)
    dims = span(0, pl.next_power_of_2(config.head_dim), config.head_dim)
    shape = len(members.ids), len(dims.ids)
    size = min(pl.next_power_of_2(capacity), max(1, _MOST_PRODUCTS // (shape[0] * shape[1])))
    kv = Span(jnp.full((1,), kv_head, jnp.int32), jnp.ones((1,), bool))
    ids = (kv_head * group + members.ids[:, None]) * config.head_dim + dims.ids[None]
    columns = Span(ids, members.exist[:, None] & dims.exist[None])
    queries = load_at(query, (row.ids[:, None], ids), columns.exist).astype(jnp.float32)

    def add_block(block: Array, before: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, mixed = before
        slots = span(block * size, size, capacity)
        # What is not visible may hold anything, and 0 times infinity is no number.
        slots = Span(slots.ids, slots.exist & (slots.ids <= position))
        keys = jnp.squeeze(load(cache.key, batch, kv, dims, slots), axis=(0, 1))  # [H, S]
        values = jnp.squeeze(load(cache.value, batch, kv, dims, slots), axis=(0, 1))  # [H, S]
        scores = jnp.sum(queries[:, :, None] * keys.astype(jnp.float32)[None], axis=1)  # [G, S]
        scores = jnp.where(slots.exist[None], scores * config.head_dim**-0.5, -jnp.inf)
        now = jnp.maximum(largest, jnp.max(scores, axis=1))
        kept, weights = jnp.exp(largest - now), jnp.exp(scores - now[:, None])
        added = jnp.sum(weights[:, None] * values.astype(jnp.float32)[None], axis=2)  # [G, H]
        total = total * kept + jnp.sum(weights, axis=1)
        return now, total, mixed * kept[:, None] + added

    nothing = jnp.full(shape[:1], -jnp.inf), jnp.zeros(shape[:1]), jnp.zeros(shape)
    is_one_block = size >= capacity
    last = np.int32(0) if is_one_block else jax.lax.div(jnp.max(position), np.int32(size))
    _, total, mixed = jax.lax.fori_loop(np.int32(0), last + 1, add_block, nothing)
    return columns, (mixed / total[:, None]).astype(query.dtype)


def _divided(ids: Array, by: int) -> tuple[Array, Array]:
    """Quotients and remainders of numbers that are not negative."""
    divisor = jnp.full(ids.shape, by, jnp.int32)
    return jax.lax.div(ids, divisor), jax.lax.rem(ids, divisor)


def _load_heads(matrix: Matrix, columns: Span) -> Array:
    """Columns [G, H] of the outputs of a matrix, [outputs, G, H]."""
    values = matrix.weight.values if isinstance(matrix.weight, Int8Weight) else matrix.weight
    mask = matrix.outputs.exist[:, None, None] & columns.exist[None]
    return load_at(values, (matrix.outputs.ids[:, None, None], columns.ids[None]), mask)


def _places(rows: Span, start: Ref, length: int) -> tuple[Array, Array]:
    """Of each row of activations, its row of the batch and its position."""
    batch, step = _divided(rows.ids, length)
    starts = batch if start.shape[0] > 1 else jnp.zeros_like(batch)
    return batch, load(start, Span(starts, rows.exist)) + step
