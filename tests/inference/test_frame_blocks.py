"""Blocks of a stream depend on the stream alone, and playback does not wait for them."""

import numpy as np
import pytest

from csm_jax.inference.frame_blocks import MAX_BLOCK, FrameBlocks, block_sizes


def blocks_of(frames: np.ndarray, arrivals: list[int]) -> list[np.ndarray]:
    """The blocks of frames that arrive so many at a time, the last of them at the end."""
    waiting, taken, start = FrameBlocks(frames.shape[1]), [], 0
    for count in arrivals:
        waiting.add(frames[start : start + count])
        start += count
        while size := waiting.next_size(flush=start >= len(frames)):
            taken.append(waiting.take(size))
    return taken


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9, 33, 100])
def test_blocks_are_the_same_however_frames_arrive(num_frames):
    frames = np.arange(3 * num_frames).reshape(num_frames, 3)
    rng = np.random.default_rng(num_frames)
    expected = blocks_of(frames, [num_frames])
    for _ in range(20):
        cuts = np.sort(rng.integers(0, num_frames, 5))
        arrivals = np.diff([0, *cuts, num_frames]).tolist()
        blocks = blocks_of(frames, arrivals)
        assert [len(block) for block in blocks] == [len(block) for block in expected]
        np.testing.assert_array_equal(np.concatenate(blocks), frames)


def test_every_size_has_a_program():
    sizes = {len(block) for block in blocks_of(np.zeros((103, 2)), [103])}
    assert sizes == set(block_sizes()) == {1, 2, 4, MAX_BLOCK}


def test_the_first_frame_is_a_block_of_its_own():
    frames = np.zeros((50, 2))
    assert len(blocks_of(frames, [50])[0]) == 1


@pytest.mark.parametrize("speed", [1.25, 1.3, 2.0, 10.0])
def test_playback_never_waits_for_a_block(speed):
    """Frames are generated `speed` times as fast as they are played, one by one."""
    played_until = generated = 0.0
    for block in blocks_of(np.zeros((200, 2)), [1] * 200):
        generated += len(block) / speed  # in frames of playback
        assert not played_until or generated <= played_until + 1e-9
        played_until = max(played_until, generated) + len(block)


def test_what_arrived_before_a_pause_is_decoded_in_it():
    waiting = FrameBlocks(2)
    waiting.add(np.zeros((40, 2)))
    while size := waiting.next_size(flush=False):
        waiting.take(size)
    waiting.add(np.zeros((7, 2)))
    assert waiting.next_size(flush=False) == 0
    sizes = []
    while size := waiting.next_size(flush=True):
        sizes.append(len(waiting.take(size)))
    assert sum(sizes) == 7
