"""The interventions of the utterances of a batch as the arrays of its rows."""

from collections.abc import Mapping, Sequence

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.inference.buckets import bucket
from csm_jax.inference.row_interventions import ForcedCodes, RowGuidance, RowInterventions
from csm_jax.inference.utterance import Utterance
from csm_jax.model.layers import AnyArray

# Frames that arrays by frame are padded to, at least; one entry for all frames stays one.
_LEAST_FRAMES = 32

# The utterance of each row; None in free ones.
Rows = Sequence[Utterance | None]


def stack_interventions(rows: Rows, config: CSMConfig) -> RowInterventions:
    """What is changed in the frames of all rows; rows without a kind of change have none of it."""
    return RowInterventions(
        _stack_forced(rows, config), _stack_steering(rows, config), _stack_guidance(rows)
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


def _stack_steering(rows: Rows, config: CSMConfig) -> Mapping[int, AnyArray] | None:
    steering = [(row.steering or {}) if row else {} for row in rows]
    nothing = np.zeros(config.backbone.embed_dim, np.float32)
    layers = sorted({layer for row in steering for layer in row})
    stacked = {layer: np.stack([row.get(layer, nothing) for row in steering]) for layer in layers}
    return stacked or None


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
