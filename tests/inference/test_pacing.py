"""Pacing: chunks are as long as playback allows."""

import types

import numpy as np
import pytest

from csm_jax.inference import pacing


def played(monkeypatch, seconds_per_frame: float, num_frames: int) -> tuple[list[int], float]:
    """Sizes of the chunks on a machine of some speed, and the longest gap in seconds."""
    now = 100.0
    monkeypatch.setattr(pacing, "time", types.SimpleNamespace(perf_counter=lambda: now))
    pace = pacing.Pace(0.08)
    sizes, gap, until = [], 0.0, np.inf
    while sum(sizes) < num_frames:
        size = pace.next_chunk()
        now += size * seconds_per_frame
        gap = max(gap, now - until)
        until = max(until, now) + size * 0.08 if sizes else now + size * 0.08
        pace.played(size)
        sizes.append(size)
    return sizes, gap


@pytest.mark.parametrize("seconds", [0.005, 0.02, 0.04, 0.06, 0.075])
def test_playback_has_no_gaps_on_a_machine_that_keeps_up(seconds, monkeypatch):
    sizes, gap = played(monkeypatch, seconds, 400)
    assert sizes[0] == 1
    assert set(sizes) <= {1, pacing.LONG_CHUNK}
    assert gap <= 1e-9, f"{gap:.3f} s of gap in chunks of {sizes[:12]}"


def test_a_fast_machine_gets_long_chunks(monkeypatch):
    sizes, _ = played(monkeypatch, 0.01, 400)
    assert sizes[0] == 1
    assert pacing.LONG_CHUNK in sizes[:30]
    assert sizes[-3:] == [pacing.LONG_CHUNK] * 3


def test_a_slow_machine_gets_single_frames(monkeypatch):
    sizes, _ = played(monkeypatch, 0.1, 100)
    assert set(sizes) == {1}
