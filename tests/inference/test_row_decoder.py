"""The codec of a batch: every row decodes what it decodes alone."""

import numpy as np
import pytest
from fixtures import CONFIG

from csm_jax.inference.row_decoder import RowDecoder


@pytest.mark.parametrize("together", [1, 2, 4])
def test_rows_decode_as_they_do_alone(model, together):
    """Streams of different lengths, one after another in four rows, some of them at a time."""
    rng = np.random.default_rng(together)
    decoder = RowDecoder(model.codec, 4, together)
    # Much longer than the attention's window, and its slots are reused.
    assert 2 * (model.codec.config.attention_window + 2 * 8) < 2 * 40
    streams = [
        rng.integers(0, 32, (n, CONFIG.num_codebooks), np.int32) for n in (40, 4, 7, 31, 40, 1, 18)
    ]
    waiting, running, chunks = list(range(len(streams))), {}, [[] for _ in streams]
    positions = [0] * len(streams)
    while waiting or running:
        for row in set(range(4)) - running.keys():
            if waiting:
                running[row] = waiting.pop(0)
                decoder.resume(row, None)
        rows = [row for row in running if rng.random() < 0.6] or list(running)[:1]
        left = min(len(streams[running[row]]) - positions[running[row]] for row in rows)
        size = min(2 ** int(rng.integers(0, 4)), 1 << (left.bit_length() - 1))
        blocks = {row: streams[i][positions[i] : positions[i] + size] for row, i in running.items()}
        for row, chunk in decoder.decode({row: blocks[row] for row in rows}).items():
            i = running[row]
            chunks[i].append(chunk)
            positions[i] += size
            if positions[i] == len(streams[i]):
                del running[row]
    for codes, parts in zip(streams, chunks, strict=True):
        np.testing.assert_allclose(np.concatenate(parts), model.codec.decode(codes), atol=1e-5)
