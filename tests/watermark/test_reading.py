"""Marks are read in recordings that were cut, or have another rate; unmarked ones have none."""

import numpy as np
import pytest
from pitches import CONFIG, KEY, RATE, read_pitches, tones

from csm_jax.io.audio import load_audio
from csm_jax.loading import BUNDLED
from csm_jax.watermark import Verdict, detect, reading
from csm_jax.watermark.checkpoint import random_weights
from csm_jax.watermark.message import to_symbols
from csm_jax.watermark.resampling import resample


@pytest.fixture
def pitches(monkeypatch):
    return read_pitches(monkeypatch)


@pytest.mark.parametrize("cut", [0, 1, 29, 40, 63, 64 * 5 + 50])
def test_key_is_found_wherever_the_recording_starts_and_ends(pitches, cut):
    audio = tones(300)[cut : -1 - cut]
    found = detect(audio, RATE, pitches)
    assert (found.verdict, found.key) == (Verdict.MARKED, KEY)
    assert found.confidence > 0.9


def test_key_is_found_among_silence_and_noise(pitches):
    noise = 0.001 * np.random.default_rng(0).normal(size=4000).astype(np.float32)
    audio = np.concatenate([noise * 0, noise, tones(300), noise])
    assert detect(audio, RATE, pitches).key == KEY


def test_key_is_found_at_another_rate(pitches):
    audio = resample(tones(400), RATE, 24_000)
    assert detect(audio, 24_000, pitches).key == KEY


def test_long_recordings_are_read_in_parts(pitches):
    count = 3 * reading._READ_PERIODS * CONFIG.period + 17
    symbols = reading._read_all(tones(count), pitches, 0)
    expected = np.resize(to_symbols(KEY), len(symbols))
    assert len(symbols) >= count - 1
    assert np.mean(symbols == expected) > 0.99


def test_what_is_too_short_is_not_judged(pitches):
    assert detect(tones(60), RATE, pitches).verdict is Verdict.TOO_SHORT
    assert detect(tones(2)[:10], RATE, pitches).verdict is Verdict.TOO_SHORT


@pytest.mark.parametrize("length", [0, 1, 50_000])
def test_silence_has_no_mark(pitches, length):
    found = detect(np.zeros(length, np.float32), RATE, pitches)
    assert found.verdict is Verdict.NOT_FOUND


def _unmarked(rng, speech):
    """A piece of the bundled voice, noise, or tones as of music."""
    length = int(rng.integers(CONFIG.hop * 70, CONFIG.hop * 200))
    kind = rng.integers(3)
    if kind == 0:
        start = rng.integers(len(speech) - length)
        return speech[start : start + length]
    if kind == 1:
        return rng.normal(size=length) * rng.uniform(0.01, 0.3)
    times = np.arange(length) / RATE
    notes = rng.choice([220, 277, 330, 440, 554], size=8)
    beat = int(rng.integers(500, 4000))
    pitch = np.resize(np.repeat(notes, beat), length)
    return 0.2 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + 0.1 * np.sin(880 * times)


def _thousand_recordings():
    """With several networks: a random one answers sound by symbols as freely as any."""
    rng = np.random.default_rng(4)
    paths = sorted((BUNDLED["demo"] / "prompts").glob("*.flac"))
    speech = np.concatenate([load_audio(path, RATE) for path in paths])
    for seed in range(10):
        weights = random_weights(CONFIG, seed)
        for _ in range(100):
            audio = _unmarked(rng, speech).astype(np.float32)
            yield weights, np.resize(audio, 150 * CONFIG.hop)


def test_none_of_a_thousand_unmarked_recordings_is_taken_for_marked():
    kinds = set()
    for weights, audio in _thousand_recordings():
        symbols = reading.read_symbols(audio, weights)
        kinds |= {len({*symbols})}
        assert reading.decide(symbols, CONFIG.period, (KEY,)).verdict is Verdict.NOT_FOUND
    assert max(kinds) > 2


@pytest.mark.long
def test_no_shift_of_a_thousand_unmarked_recordings_is_taken_for_marked():
    """The best of all shifts of a recording could look like a mark."""
    for weights, audio in _thousand_recordings():
        assert detect(audio, RATE, weights, (KEY,)).verdict is Verdict.NOT_FOUND
