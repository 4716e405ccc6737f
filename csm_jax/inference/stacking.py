"""The interventions of the utterances of a batch as the arrays of its rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.inference.buckets import bucket
from csm_jax.inference.row_interventions import (
    NO_STACK_INTERVENTIONS,
    ForcedCodes,
    RowGuidance,
    RowInterventions,
    StackInterventions,
    SteeredLayer,
)
from csm_jax.inference.utterance import Utterance
from csm_jax.model.changes import ReplacedHeads
from csm_jax.model.layers import AnyArray

T = TypeVar("T")

# Frames that arrays by frame are padded to, at least; one entry for all frames stays one.
_LEAST_FRAMES = 32

# The utterance of each row; None in free ones.
Rows = Sequence[Utterance | None]


def stack_interventions(rows: Rows, config: CSMConfig) -> RowInterventions:
    """What is changed in the frames of all rows; rows without a kind of change have none of it."""
    nothing = NO_STACK_INTERVENTIONS
    return RowInterventions(
        _stack_forced(rows, config),
        _stack_layers([row.backbone if row else nothing for row in rows]),
        _stack_layers([row.depth_decoder if row else nothing for row in rows]),
        _stack_guidance(rows),
    )


def _stack_forced(rows: Rows, config: CSMConfig) -> ForcedCodes | None:
    forced = [row.forced if row else None for row in rows]
    num_frames = [0 if codes is None else len(codes) for codes in forced]
    if not any(num_frames):
        return None
    shape = len(rows), bucket(max(num_frames), _LEAST_FRAMES), config.num_codebooks
    stacked = np.full(shape, -1, np.int32)
    for row, codes in zip(stacked, forced, strict=True):
        if codes is not None:
            row[: len(codes)] = codes
    return ForcedCodes(stacked, np.asarray(num_frames, np.int32))


def _stack_layers(rows: Sequence[StackInterventions]) -> StackInterventions:
    return StackInterventions(
        _by_layer([row.steering for row in rows], _stack_steered),
        _by_layer([row.heads for row in rows], _stack_heads),
    )


def _by_layer(
    rows: Sequence[Mapping[int, T]], stack: Callable[[Sequence[T | None]], T]
) -> Mapping[int, T]:
    """What is stacked of each layer that any row has something of."""
    layers = sorted({layer for row in rows for layer in row})
    return {layer: stack([row.get(layer) for row in rows]) for layer in layers}


def _stack_steered(rows: Sequence[SteeredLayer | None]) -> SteeredLayer:
    count = max(len(row.vectors) for row in rows if row)
    dim = next(row.vectors.shape[1] for row in rows if row)
    nothing = SteeredLayer(np.zeros((0, dim), np.float32), np.zeros((1, 0), np.float32))
    filled = [row or nothing for row in rows]
    vectors = [_padded(row.vectors, count, axis=0) for row in filled]
    strengths = [_padded(row.strengths, count, axis=1) for row in filled]
    return SteeredLayer(np.stack(vectors), _by_frame(strengths))


def _stack_heads(rows: Sequence[ReplacedHeads | None]) -> ReplacedHeads:
    nothing = jax.tree.map(np.zeros_like, next(row for row in rows if row))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *[row or nothing for row in rows])


def _padded(x: AnyArray, length: int, axis: int) -> np.ndarray:
    """An array with zeros at the end of an axis."""
    padding = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return np.pad(x, padding)


def _stack_guidance(rows: Rows) -> RowGuidance | None:
    guidance = [row.guidance if row else None for row in rows]
    if not any(guidance):
        return None
    scales = [each.scale if each else np.ones(1, np.float32) for each in guidance]
    depth = np.asarray([each is not None and each.depth_decoder for each in guidance])
    is_on = np.asarray([each is not None for each in guidance])
    return RowGuidance(_by_frame(scales), is_on, depth if depth.any() else None)


def _by_frame(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [R, ...] of different lengths as [B, R, ...]; the last entry of each goes on."""
    longest = max(map(len, rows))
    length = 1 if longest == 1 else bucket(longest, _LEAST_FRAMES)
    index = np.arange(length)
    return np.stack([row[np.minimum(index, len(row) - 1)] for row in rows])
