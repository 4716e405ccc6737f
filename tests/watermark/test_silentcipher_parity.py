"""The watermark equals the package silentcipher, on random weights in its released sizes."""

import importlib.util

import numpy as np
import pytest
import silentcipher_oracle as oracle

from csm_jax.watermark import checkpoint, reading
from csm_jax.watermark.message import to_symbols
from csm_jax.watermark.network import Statistics
from csm_jax.watermark.reference import embed_like_reference

if not all(importlib.util.find_spec(name) for name in ("torch", "silentcipher", "pydub")):
    pytest.skip("needs torch, silentcipher and pydub", allow_module_level=True)

KEY = [212, 211, 146, 56, 201]
# Shorter than a message, and a multiple of the frame.
SHORT = [3000, 2 * 4096]
# Longer than a message and a multiple of nothing; a minute.
LONG = [50_001, 60 * 44_100]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("silentcipher")
    reference = oracle.make_reference(directory)
    return reference, checkpoint.read_torch(directory)


def _speech(length):
    """Noise whose level changes, with partials of a voice."""
    rng = np.random.default_rng(length)
    times = np.arange(length) / 44_100
    voice = sum(np.sin(2 * np.pi * 140 * n * times) / n for n in range(1, 30))
    level = 0.6 + 0.4 * np.sin(2 * np.pi * 3 * times)
    return (0.05 * level * voice + 0.01 * rng.normal(size=length)).astype(np.float32)


def check_both_ways(reference, weights, audio):
    """Each marks the audio as the other, and reads the same in what the other has marked."""
    expected, _ = reference.encode_wav(audio, 44_100, KEY, message_sdr=20, calc_sdr=False)
    marked = embed_like_reference(audio, weights, KEY, 20.0)
    assert marked.shape == expected.shape == audio.shape
    assert np.abs(expected - audio).max() > 3e-3  # there is a mark
    np.testing.assert_allclose(marked, expected, atol=1e-5)
    theirs, logits = oracle.read_symbols(reference, marked)
    assert len({*theirs}) > 2
    second, first = np.sort(logits, axis=0)[-2:]
    assert (first - second).min() > 1e-4  # no two symbols are equally probable
    np.testing.assert_array_equal(reading.read_symbols(expected, weights), theirs)


@pytest.mark.parametrize("length", SHORT)
def test_each_marks_and_reads_as_the_other(networks, length):
    check_both_ways(*networks, _speech(length))


@pytest.mark.long
@pytest.mark.timeout(3600)  # six minutes of computation for a minute of audio, and 6 GB
@pytest.mark.parametrize("length", LONG)
def test_each_marks_and_reads_long_recordings_as_the_other(networks, length):
    check_both_ways(*networks, _speech(length))


def test_the_mark_by_statistics_of_the_training_is_that_of_the_evaluation_mode(networks):
    reference, weights = networks
    audio = _speech(5000)
    # In training mode, each marked recording has changed its statistics.
    reference.load_models(reference.config.load_ckpt)
    parts = (reference.enc_c, reference.dec_c)
    for part in parts:
        part.eval()
    try:
        expected, _ = reference.encode_wav(audio, 44_100, KEY, message_sdr=20, calc_sdr=False)
    finally:
        for part in parts:
            part.train()
    marked = embed_like_reference(audio, weights, KEY, 20.0, Statistics.TRAINED)
    assert np.abs(expected - audio).max() > 3e-3
    np.testing.assert_allclose(marked, expected, atol=1e-5)


def test_the_search_for_the_shift_is_the_same(networks, monkeypatch):
    """The reference is given the symbols of our decoder, as its own takes minutes for a search."""
    torch = pytest.importorskip("torch")
    reference, weights = networks
    rng = np.random.default_rng(3)
    tables = {shift: rng.integers(5, size=42) for shift in range(0, 500, 10)}
    tables[130] = np.concatenate([tables[130][:21]] * 2)
    tables[130][0] = (tables[130][0] + 1) % 5
    tables[300] = np.concatenate([tables[300][:21]] * 2)

    class Decoder:
        shifts = iter(tables)

        def __call__(self, carrier):
            symbols = torch.from_numpy(tables[next(self.shifts)])
            return torch.nn.functional.one_hot(symbols, 5).T[None, None].float()

    monkeypatch.setattr(reference, "dec_m", [Decoder()])
    monkeypatch.setattr(reference.config, "HOP_LENGTH", 500)  # fewer shifts
    monkeypatch.setattr(reading, "read_symbols", lambda samples, weights, shift: tables[shift])
    samples = np.zeros(5000, np.float32)
    found, _ = reading.find_shift(samples, weights, range(0, 500, reading.REFERENCE_STEP))
    assert found == reference.get_best_ps(samples) == 300


def test_keys_are_the_same_symbols(networks):
    reference, _ = networks
    symbols, _ = reference.letters_encoding(50, [_two_bits(KEY)])
    expected = symbols[0].argmax(axis=0)
    np.testing.assert_array_equal(to_symbols(KEY)[np.arange(50) % 21], expected)


def _two_bits(key):
    """As inside of `encode_wav`."""
    bits = "".join(f"{number:08b}" for number in key)
    return [int(bits[at : at + 2], 2) for at in range(0, len(bits), 2)]
