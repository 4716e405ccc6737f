"""Pieces of recordings with phoneme labels, for the training of a codec."""

from typing import NamedTuple

import numpy as np
from speech_set import Packed

from csm_jax.config import MimiConfig

# Every codec frame has this many labels, evenly spaced.
LABELS_PER_FRAME = 2
# Pieces are scaled by a random factor between this and 1.
FAINTEST = 0.5


class Batch(NamedTuple):
    """A batch: audio float32 [B, samples]; labels int32 [B, frames, `LABELS_PER_FRAME`]."""

    audio: np.ndarray
    labels: np.ndarray


class CodecBatches:
    """Batches of random pieces; batch number i is the same in every run of a seed.

    Args:
      rows: pieces in a batch.
      frames: codec frames in a piece.
    """

    def __init__(self, speech: Packed, *, config: MimiConfig, rows: int, frames: int, seed: int):
        self._speech = speech
        self._rows = rows
        self._size = frames * config.frame_size
        self._seed = seed
        spacing = config.frame_size / LABELS_PER_FRAME
        count = frames * LABELS_PER_FRAME
        self._label_times = ((np.arange(count) + 0.5) * spacing).astype(np.int64)
        # Every second of speech is equally likely.
        self._shares = speech.lengths / speech.lengths.sum()

    def batch(self, number: int) -> Batch:
        random = np.random.default_rng([self._seed, number])
        chosen = random.choice(len(self._shares), self._rows, p=self._shares)
        pieces = [self._piece(index, random) for index in chosen]
        return Batch(*map(np.stack, zip(*pieces, strict=True)))

    def _piece(self, index: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        spare = max(0, int(self._speech.lengths[index]) - self._size)
        start = int(random.integers(spare + 1))
        audio = self._speech.audio(index, start, self._size)
        labels = self._speech.labels(index, start + self._label_times)
        loudness = np.float32(random.uniform(FAINTEST, 1))
        return audio * loudness, labels.reshape(-1, LABELS_PER_FRAME).astype(np.int32)
