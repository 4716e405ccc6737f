"""Batches of examples of similar lengths, in an order that can be saved and resumed."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import grain
import numpy as np

from csm_jax.model.layers import AnyArray
from csm_jax.train.examples import Example

SHORTEST = 32
# Takes the place of the epoch in the seed: no run has this many epochs.
_HOLDOUT = 2**31


class Batch(NamedTuple):
    """Rows of one length, padded on the right; empty rows fill up the last batches of an epoch.

    Attributes:
      frames, mask: [B, T, Q + 1], int32 and bool.
      loss_mask: bool [B, T], the frames that count in the loss.
      spoken: int32 [B, T, 2], `Example.spoken`; None without guided attention.
    """

    frames: AnyArray
    mask: AnyArray
    loss_mask: AnyArray
    spoken: AnyArray | None = None


def bucket(length: int) -> int:
    """The length that rows are padded to: a power of two or three quarters of one, at least 32."""
    above = max(SHORTEST, 1 << (length - 1).bit_length())
    between = above * 3 // 4
    return between if length <= between and between > SHORTEST else above


def longest(examples: Iterable[Example]) -> int:
    """The number of frames of the longest example."""
    return max(len(example.frames) for example in examples)


def make_batch(examples: Sequence[Example], num_rows: int, limit: int | None = None) -> Batch:
    """Examples as the first rows of a batch.

    Args:
      limit: of all examples the `longest`, which is long enough for every batch: its multiple of 32
        takes the place of longer buckets.
    """
    length = bucket(longest(examples))
    if limit is not None:
        length = min(length, -(-limit // SHORTEST) * SHORTEST)
    columns = examples[0].frames.shape[1]
    frames = np.zeros((num_rows, length, columns), np.int32)
    mask = np.zeros(frames.shape, bool)
    loss_mask = np.zeros(frames.shape[:2], bool)
    is_guided = examples[0].spoken is not None
    spoken = np.zeros((num_rows, length, 2), np.int32) if is_guided else None
    for row, example in enumerate(examples):
        size = len(example.frames)
        frames[row, :size] = example.frames
        mask[row, :size] = example.mask
        loss_mask[row, :size] = example.loss_mask
        if spoken is not None and example.spoken is not None:
            spoken[row, :size] = example.spoken
    return Batch(frames, mask, loss_mask, spoken)


class ShuffledBatches:
    """The batches of all epochs, by number: a random-access data source of grain's.

    Every example is in one batch of an epoch, together with others of about its length. The
    batches of an epoch and their order are drawn from the seed and the number of the epoch alone.
    """

    def __init__(self, examples: Sequence[Example], num_rows: int, seed: int):
        self._examples = examples
        self._num_rows = num_rows
        self._seed = seed
        self._longest = longest(examples)
        self._buckets: dict[int, list[int]] = {}
        for index, example in enumerate(examples):
            self._buckets.setdefault(bucket(len(example.frames)), []).append(index)
        self._plans: dict[int, list[np.ndarray]] = {}

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return sum(-(-len(indices) // self._num_rows) for indices in self._buckets.values())

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> Batch:
        epoch, index = divmod(int(number), self.num_batches)
        chosen = [self._examples[i] for i in self._plan(epoch)[index]]
        return make_batch(chosen, self._num_rows, self._longest)

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """The indices of the examples of every batch."""
        if epoch not in self._plans:
            random = np.random.default_rng((self._seed, epoch))
            plan = []
            for _, indices in sorted(self._buckets.items()):
                shuffled = random.permutation(indices)
                plan += np.split(shuffled, range(self._num_rows, len(shuffled), self._num_rows))
            self._plans = {epoch: [plan[i] for i in random.permutation(len(plan))]}
        return self._plans[epoch]


def shuffled_batches(
    examples: Sequence[Example], num_rows: int, seed: int
) -> grain.DatasetIterator:
    """An endless iterator of batches; `get_state` and `set_state` save and restore its position."""
    source = ShuffledBatches(examples, num_rows, seed)
    numbers = grain.MapDataset.range(0, 2**40)
    return iter(numbers.map(source.__getitem__).to_iter_dataset(_IN_ORDER))


# One thread that reads ahead: batches are slices of what is in memory.
_IN_ORDER = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def ordered_batches(examples: Sequence[Example], num_rows: int) -> list[Batch]:
    """The batches of one pass, sorted by length: every example once."""
    by_length = sorted(examples, key=lambda example: len(example.frames))
    starts = range(0, len(by_length), num_rows)
    limit = longest(by_length) if by_length else None
    return [make_batch(by_length[start : start + num_rows], num_rows, limit) for start in starts]


def split_holdout(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and examples to hold out.

    Args:
      share: of the examples, those to hold out; rounded, but at least one. Nothing is held out if
        it is 0, or of a single example.
    """
    if share == 0 or len(examples) < 2:
        return list(examples), []
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    random = np.random.default_rng((seed, _HOLDOUT))
    held = set(random.permutation(len(examples))[:count].tolist())
    train = [example for i, example in enumerate(examples) if i not in held]
    return train, [example for i, example in enumerate(examples) if i in held]
