"""The blocks of frames in which a stream is decoded.

Rounding depends on the size of a block, so sizes that followed the clock would make other samples
at every repetition of a request. Here a size depends on the block's place in the stream alone.
"""

import numpy as np

from csm_jax.mimi.transformer import MAX_STREAM_FRAMES

# Frames that are decoded at once in the long run. They cost the codec hardly more than one.
MAX_BLOCK = MAX_STREAM_FRAMES
# A block is collected while those before it are played, which are at least this many times as long.
# So playback has no gaps where frames are generated 1.25 times as fast as they are played.
_PLAYED_PER_WAITED = 4


def block_sizes() -> list[int]:
    """All sizes of blocks, each of which is a program of the codec."""
    return [1 << i for i in range(MAX_BLOCK.bit_length())]


def block_size(num_decoded: int) -> int:
    """The size of the block after so many frames: a power of two, at most `MAX_BLOCK`."""
    share = max(1, min(num_decoded // _PLAYED_PER_WAITED, MAX_BLOCK))
    return 1 << (share.bit_length() - 1)


class FrameBlocks:
    """The frames of a stream that are not decoded yet, [n, Q], cut into blocks."""

    def __init__(self, num_codebooks: int):
        """Begins a stream of frames with Q = `num_codebooks`."""
        self._frames = np.zeros((0, num_codebooks), np.int32)
        self._num_taken = 0

    def add(self, frames: np.ndarray) -> None:
        """Appends frames [n, Q]."""
        self._frames = np.concatenate([self._frames, frames])

    def next_size(self, flush: bool) -> int:
        """The size of the next block; 0 if its frames are not there yet.

        Args:
          flush: nothing will follow for a while: what is there makes blocks of its own.
        """
        size, num_frames = block_size(self._num_taken), len(self._frames)
        if num_frames >= size:
            return size
        return 1 << (num_frames.bit_length() - 1) if flush and num_frames else 0

    def take(self, size: int) -> np.ndarray:
        """Removes and returns the next `size` frames."""
        taken, self._frames = np.split(self._frames, [size])
        self._num_taken += size
        return taken
