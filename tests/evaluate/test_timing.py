"""The clock of a stream, by hand."""

import numpy as np
import pytest

from csm_jax.evaluate.timing import Chunk, StreamClock, count_in_time

# The arrivals of chunks of one second, and how many after the first were in time.
STREAMS = [
    ([], 0),
    ([5.0], 0),
    ([5.0, 5.5, 6.9, 8.0], 3),
    ([0.0, 1.1], 0),
    # The second is late by 1 s; from then on everything is needed 1 s later, and the last is late.
    ([0.0, 2.0, 3.0, 4.0, 5.5], 2),
    # Always as slow as playback and half a second more.
    ([0.0, 1.5, 3.0, 4.5], 0),
]


@pytest.mark.parametrize(("arrivals", "in_time"), STREAMS)
def test_a_chunk_is_in_time_if_the_earlier_ones_are_still_playing(arrivals, in_time):
    assert count_in_time([Chunk(arrival, 1.0) for arrival in arrivals]) == in_time


def test_the_clock_counts_from_its_making():
    times = iter([10.0, 10.5, 11.0, 12.0])
    clock = StreamClock(24_000, lambda: next(times))
    clock(np.zeros(1920, np.float32))
    clock(np.zeros(3840, np.float32))
    clock(None)
    assert clock.chunks == [Chunk(0.5, 0.08), Chunk(1.0, 0.16)]
    assert clock.wait() == 2.0
