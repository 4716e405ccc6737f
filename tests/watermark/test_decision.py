"""Marks are found among wrong symbols, and never in symbols of unmarked sound."""

import numpy as np
import pytest

from csm_jax.watermark.decision import MAX_FALSE_RATE, Verdict, decide, find_consensus
from csm_jax.watermark.message import PUBLIC_KEY, from_symbols, to_symbols

PERIOD = 21
KEY = (17, 202, 5, 99, 240)


def _marked(key, count, wrong, rng):
    """Symbols of a mark that begins anywhere, of which a share is replaced by any symbols."""
    symbols = to_symbols(key)[(np.arange(count) + rng.integers(PERIOD)) % PERIOD]
    return np.where(rng.random(count) < wrong, rng.integers(5, size=count), symbols)


def _unmarked(rng, count):
    """Symbols that stay for a while, some more frequent than others, as sound changes slowly."""
    weights = rng.dirichlet(np.full(5, rng.choice([0.1, 1.0, 10.0])))
    draws = rng.choice(5, size=count, p=weights)
    stays = rng.random(count) < rng.choice([0.0, 0.5, 0.9, 0.98])
    for index in range(1, count):
        if stays[index]:
            draws[index] = draws[index - 1]
    return draws


def test_keys_become_symbols_and_back_from_any_start():
    rng = np.random.default_rng(0)
    for key in [*rng.integers(256, size=(50, 5)), [0] * 5, [255] * 5]:
        symbols = to_symbols(key)
        assert symbols.shape == (PERIOD,)
        assert from_symbols(np.roll(symbols, rng.integers(PERIOD))) == tuple(key)
    assert from_symbols(np.ones(PERIOD, int)) is None
    assert from_symbols(np.zeros(PERIOD, int)) is None


@pytest.mark.parametrize(("periods", "wrong"), [(5, 0.0), (8, 0.1), (30, 0.3)])
def test_unknown_keys_are_found(periods, wrong):
    rng = np.random.default_rng(periods)
    for key in rng.integers(256, size=(20, 5)):
        found = decide(_marked(key, periods * PERIOD + 4, wrong, rng), PERIOD, num_tries=30)
        assert found.verdict is Verdict.MARKED
        assert found.key == tuple(key)
        assert found.false_rate <= MAX_FALSE_RATE


def test_known_keys_are_found_in_less():
    rng = np.random.default_rng(1)
    symbols = _marked(KEY, 3 * PERIOD, 0.05, rng)
    assert decide(symbols, PERIOD).verdict is Verdict.TOO_SHORT
    found = decide(symbols, PERIOD, (PUBLIC_KEY, KEY), num_tries=30)
    assert (found.verdict, found.key) == (Verdict.MARKED, KEY)


def test_less_than_three_messages_are_too_short():
    symbols = to_symbols(KEY)[np.arange(3 * PERIOD - 1) % PERIOD]
    assert decide(symbols, PERIOD, (KEY,)).verdict is Verdict.TOO_SHORT
    assert decide(symbols[:0], PERIOD, (KEY,)).verdict is Verdict.TOO_SHORT


def test_no_unmarked_symbols_are_taken_for_a_mark():
    """Also as the best of several shifts, and when keys are looked for."""
    rng = np.random.default_rng(2)
    for _ in range(1000):
        symbols = _unmarked(rng, rng.integers(3 * PERIOD, 30 * PERIOD))
        found = decide(symbols, PERIOD, (PUBLIC_KEY, KEY), num_tries=30)
        assert found.verdict is not Verdict.MARKED


@pytest.mark.parametrize("beat", [2, 3, 5, 7, 10, 20, 22, 42])
def test_other_rhythms_are_not_marks(beat):
    rng = np.random.default_rng(beat)
    for wrong in (0.0, 0.2):
        symbols = np.resize(rng.integers(5, size=beat), 300)
        symbols = np.where(rng.random(300) < wrong, rng.integers(5, size=300), symbols)
        assert decide(symbols, PERIOD, (PUBLIC_KEY,)).verdict is not Verdict.MARKED


@pytest.mark.parametrize("symbol", range(5))
def test_one_symbol_alone_is_no_mark(symbol):
    found = decide(np.full(500, symbol), PERIOD, (PUBLIC_KEY,))
    assert found.verdict is Verdict.NOT_FOUND


def test_consensus_is_the_most_frequent_symbol():
    symbols = np.array([0, 1, 2, 0, 3, 2, 4, 1, 1, 9])
    consensus, confidence = find_consensus(symbols, 3)
    np.testing.assert_array_equal(consensus, [0, 1, 2])
    assert confidence == pytest.approx(6 / 9)
