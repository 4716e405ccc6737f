"""Batches: every example once an epoch, in few shapes, and resumable at any position."""

import itertools
import json
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from fixtures import CONFIG

from csm_jax.train.batches import (
    Batch,
    ShuffledBatches,
    bucket,
    make_batch,
    ordered_batches,
    shuffled_batches,
    split_holdout,
)
from csm_jax.train.examples import Example

COLUMNS = CONFIG.num_codebooks + 1
# Powers of two, and three quarters of them.
BUCKETS = sorted([2**k for k in range(5, 12)] + [3 * 2**k for k in range(4, 10)])
LENGTHS = [5, 31, 32, 33, 40, 48, 49, 64, 64, 64, 65, 70, 90, 96, 97, 100, 20, 20, 20, 45, 60]


def example(number: int, length: int) -> Example:
    """An example whose first code is its number; no position of it looks like padding."""
    random = np.random.default_rng(number)
    frames = random.integers(1, 1000, (length, COLUMNS), np.int32)
    frames[0, 0] = 1000 + number
    mask = random.random(frames.shape) < 0.5
    mask[:, 0] = True
    loss_mask = random.random(length) < 0.5
    loss_mask[-1] = True
    return Example(frames, mask, loss_mask, ())


EXAMPLES = [example(number, length) for number, length in enumerate(LENGTHS)]


def members(batch: Batch) -> list[int]:
    """The numbers of the examples of a batch, without padding rows."""
    return [int(row[0, 0]) - 1000 for row in batch.frames if row.any()]


def all_members(batches: Sequence[Batch]) -> list[int]:
    return [number for batch in batches for number in members(batch)]


def epoch(source: ShuffledBatches, number: int) -> list[Batch]:
    first = number * source.num_batches
    return [source[i] for i in range(first, first + source.num_batches)]


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.spoken is None) == (other.spoken is None)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def assert_right(batch: Batch, num_rows: int) -> None:
    """Rows are unchanged examples, then padding that is masked and not in the loss."""
    frames, mask, loss_mask, _ = batch
    assert (frames.dtype, mask.dtype, loss_mask.dtype) == (np.int32, bool, bool)
    assert frames.shape == mask.shape == (num_rows, frames.shape[1], COLUMNS)
    assert loss_mask.shape == frames.shape[:2]
    numbers = members(batch)
    for row, number in itertools.zip_longest(range(num_rows), numbers):
        size = 0 if number is None else LENGTHS[number]
        if number is not None:
            np.testing.assert_array_equal(frames[row, :size], EXAMPLES[number].frames)
            np.testing.assert_array_equal(mask[row, :size], EXAMPLES[number].mask)
            np.testing.assert_array_equal(loss_mask[row, :size], EXAMPLES[number].loss_mask)
        assert not frames[row, size:].any()
        assert not mask[row, size:].any()
        assert not loss_mask[row, size:].any()


def test_bucket_is_the_shortest_that_fits():
    for length in range(1, 2049):
        assert bucket(length) == min(size for size in BUCKETS if size >= length)


@pytest.mark.parametrize("num_rows", [1, 2, 4, 50])
def test_a_batch_has_examples_and_padding(num_rows):
    chosen = [3, 0, 8, 15][:num_rows]
    batch = make_batch([EXAMPLES[i] for i in chosen], num_rows)
    assert members(batch) == chosen
    assert batch.frames.shape[1] == bucket(max(LENGTHS[i] for i in chosen))
    assert_right(batch, num_rows)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("seed", [0, 9])
def test_every_epoch_has_every_example_once(num_rows, seed):
    source = ShuffledBatches(EXAMPLES, num_rows, seed)
    in_bucket = [sum(bucket(length) == size for length in LENGTHS) for size in BUCKETS]
    # Only the last batch of a bucket may have padding rows.
    assert source.num_batches == len(source) == sum(-(-n // num_rows) for n in in_bucket)
    for number in range(4):
        batches = epoch(source, number)
        assert sorted(all_members(batches)) == list(range(len(LENGTHS)))
        for batch in batches:
            assert_right(batch, num_rows)
            assert {bucket(LENGTHS[i]) for i in members(batch)} == {batch.frames.shape[1]}


def test_no_batch_is_longer_than_the_longest_example_needs():
    examples = [example(number, length) for number, length in enumerate((40, 129, 130))]
    source = ShuffledBatches(examples, 2, 0)
    # The next multiple of 32, where the bucket has 192.
    assert sorted(batch.frames.shape[1] for batch in epoch(source, 0)) == [48, 160]
    assert sorted(all_members(epoch(source, 0))) == [0, 1, 2]
    for batch in epoch(source, 0):
        size = batch.frames.shape[1]
        for row, number in enumerate(members(batch)):
            length = len(examples[number].frames)
            np.testing.assert_array_equal(batch.frames[row, :length], examples[number].frames)
            assert length <= size
    assert [batch.frames.shape[1] for batch in ordered_batches(examples, 1)] == [48, 160, 160]


def test_an_epoch_depends_on_its_number_and_the_seed_alone():
    """The order of access does not matter; so all processes of several have the same batches."""
    source, other = ShuffledBatches(EXAMPLES, 3, 7), ShuffledBatches(EXAMPLES, 3, 7)
    in_order = [epoch(source, number) for number in range(3)]
    for number in (2, 0, 1):
        for one, same in zip(epoch(other, number), in_order[number], strict=True):
            assert_same(one, same)
    orders = [[members(batch) for batch in batches] for batches in in_order]
    orders.append([members(batch) for batch in epoch(ShuffledBatches(EXAMPLES, 3, 8), 0)])
    assert all(one != other for one, other in itertools.combinations(orders, 2))


def test_the_composition_and_order_of_batches_are_uniform():
    """600 epochs of 4 examples of one bucket, in batches of 2: 0 is in the first of the two in
    half of them, and with each of the others in a third (4 deviations: 49 and 46)."""
    source = ShuffledBatches([example(i, 10) for i in range(4)], 2, seed=0)
    company = np.zeros(4, int)
    first = 0
    for number in range(600):
        batches = [members(batch) for batch in epoch(source, number)]
        position = 0 if 0 in batches[0] else 1
        first += position == 0
        company[batches[position]] += 1
    assert abs(first - 300) < 49
    assert company[0] == 600
    assert (abs(company[1:] - 200) < 46).all()


def test_batches_of_all_lengths_come_first_equally_often():
    """Every bucket comes first in as many of 600 epochs as it has batches (5 deviations)."""
    source = ShuffledBatches(EXAMPLES, 4, seed=0)
    lengths = [[batch.frames.shape[1] for batch in epoch(source, i)] for i in range(600)]
    first = [of_epoch[0] for of_epoch in lengths]
    for size in set(lengths[0]):
        share = lengths[0].count(size) / len(lengths[0])
        deviation = (600 * share * (1 - share)) ** 0.5
        assert abs(first.count(size) - 600 * share) < 5 * deviation


# --- The iterator -------------------------------------------------------------------------------

NUM_BATCHES = ShuffledBatches(EXAMPLES, 4, 3).num_batches


def test_batches_continue_over_the_ends_of_epochs():
    """They are those of the source, in its order."""
    source = ShuffledBatches(EXAMPLES, 4, 3)
    batches = shuffled_batches(EXAMPLES, 4, 3)
    for number in range(3 * NUM_BATCHES + 1):
        assert_same(next(batches), source[number])


@pytest.mark.parametrize("taken", [0, 1, NUM_BATCHES - 1, NUM_BATCHES, 2 * NUM_BATCHES + 3])
def test_a_saved_position_restores_the_same_batches(taken):
    """Also from JSON and in another iterator, whether batches were read ahead or not."""
    batches = shuffled_batches(EXAMPLES, 4, 3)
    for _ in range(taken):
        next(batches)
    position = json.dumps(batches.get_state())
    following = [next(batches) for _ in range(NUM_BATCHES + 2)]
    other = shuffled_batches(EXAMPLES, 4, 3)
    other.set_state(json.loads(position))
    for batch in following:
        assert_same(next(other), batch)
    batches.set_state(json.loads(position))
    for batch in following:
        assert_same(next(batches), batch)


def test_a_saved_position_does_not_change():
    batches = shuffled_batches(EXAMPLES, 4, 3)
    next(batches)
    position = batches.get_state()
    before = json.dumps(position)
    next(batches)
    assert json.dumps(position) == before
    assert json.dumps(batches.get_state()) != before


# --- Evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 8, 50])
def test_ordered_batches_are_one_pass_sorted_by_length(num_rows):
    batches = ordered_batches(EXAMPLES, num_rows)
    assert len(batches) == -(-len(EXAMPLES) // num_rows)
    order = all_members(batches)
    assert sorted(order) == list(range(len(EXAMPLES)))
    assert [LENGTHS[i] for i in order] == sorted(LENGTHS)
    for batch in batches:
        assert_right(batch, num_rows)
        assert batch.frames.shape[1] == bucket(max(LENGTHS[i] for i in members(batch)))


def test_without_examples_there_are_no_batches():
    assert ordered_batches([], 4) == []


# Number of examples, share, number of held-out examples.
HELD_OUT = {
    (20, 0.05): 1,
    (20, 0.25): 5,
    (20, 0.001): 1,
    (20, 0.0): 0,
    (20, 0.999): 19,
    (2, 0.05): 1,
    (2, 0.99): 1,
    (1, 0.5): 0,
    (0, 0.5): 0,
}


@pytest.mark.parametrize(("count", "share"), HELD_OUT)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_share_is_held_out(count, share, seed):
    train, held = split_holdout(list(range(count)), share, seed)
    assert len(held) == HELD_OUT[count, share]
    assert sorted(train + held) == list(range(count))
    assert (train, held) == split_holdout(list(range(count)), share, seed)
    assert (train, held) == (sorted(train), sorted(held)), "in the order of the file"


def test_held_out_examples_are_drawn_uniformly():
    """Each of 10 examples in a tenth of 400 draws (5 deviations: 30)."""
    drawn = [split_holdout(range(10), 0.1, seed)[1][0] for seed in range(400)]
    assert (abs(np.bincount(drawn, minlength=10) - 40) < 30).all()
