"""A marked stream is the marked whole, later by no more than its delay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax.errors import InputError
from csm_jax.io.audio import load_audio
from csm_jax.loading import BUNDLED
from csm_jax.watermark import Marker, Watermark, embed, marking, network, reading, spectrum
from csm_jax.watermark.checkpoint import random_weights
from csm_jax.watermark.config import WatermarkConfig, tiny
from csm_jax.watermark.network import Statistics
from csm_jax.watermark.reference import embed_like_reference

KEY = (1, 2, 3, 40, 250)


@pytest.fixture(scope="module")
def weights():
    return random_weights(tiny())


def _noise(length, seed=0):
    return (0.1 * np.random.default_rng(seed).normal(size=length)).astype(np.float32)


def _stream(weights, audio, rate, size, **options):
    """The marked audio, and the greatest number of samples that were missing on the way."""
    marker = Marker(weights, KEY, rate, **options)
    given, late = [], 0
    for start in range(0, len(audio), size):
        given.append(marker.add(audio[start : start + size]))
        late = max(late, min(start + size, len(audio)) - sum(map(len, given)))
    given.append(marker.finish())
    assert late <= marker.delay
    return np.concatenate(given), late


@pytest.mark.parametrize("rate", [44_100, 24_000])
@pytest.mark.parametrize("length", [1, 63, 64, 128, 700, 3001])
def test_stream_is_equal_to_the_whole(weights, rate, length):
    audio = _noise(length)
    whole = embed(audio, rate, weights, KEY)
    assert whole.shape == audio.shape
    streams = [_stream(weights, audio, rate, size)[0] for size in (17, 600)]
    np.testing.assert_array_equal(streams[0], streams[1])
    np.testing.assert_allclose(streams[0], whole, atol=1e-6)


@pytest.mark.parametrize("rate", [44_100, 24_000])
def test_delay_is_stated_and_reached_nearly(weights, rate):
    _, late = _stream(weights, _noise(3000), rate, size=1)
    delay = Marker(weights, KEY, rate).delay
    assert 0.8 * delay < late <= delay


def test_delay_of_the_released_sizes_is_under_two_fifths_of_a_second():
    marker = Marker(random_weights(WatermarkConfig()), KEY, 24_000)
    assert 0.37 < marker.delay / 24_000 < 0.385


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-5)])
def test_stream_marks_as_the_reference_where_the_power_is_constant(
    weights, monkeypatch, dtype, tolerance
):
    """Samples of one magnitude: the power up to each frame is that of the whole."""
    weights = dataclasses.replace(weights, dtype=dtype)
    audio = 0.1 * np.sign(_noise(2000))
    config = weights.config
    gain = (marking.TRAINED_POWER / 0.01) ** 0.5
    frames = spectrum.split_frames(audio, config.n_fft)
    carrier = spectrum.magnitude(spectrum.transform(frames)) * gain
    rms = float(np.sqrt(np.mean(np.square(carrier))))
    assert marking._carrier_rms(config) == pytest.approx(rms, rel=0.1)
    monkeypatch.setattr(marking, "_carrier_rms", lambda config: rms)
    expected = embed_like_reference(audio, weights, KEY, 31.0, Statistics.TRAINED)
    marked = embed(audio, config.sample_rate, weights, KEY, 31.0)
    assert np.abs(expected - audio).max() > 1e-3
    np.testing.assert_allclose(marked, expected, atol=tolerance)


def test_bfloat16_changes_neither_the_audio_nor_what_is_read():
    """In the released sizes, and with speech, whose partials differ most."""
    weights = random_weights(WatermarkConfig())
    path = sorted((BUNDLED["demo"] / "prompts").glob("*.flac"))[0]
    audio = load_audio(path, 44_100)[: 2 * 44_100].astype(np.float32)
    marked, expected = (
        embed(audio, 44_100, dataclasses.replace(weights, dtype=dtype), KEY)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    np.testing.assert_allclose(marked, expected, atol=1e-4)
    assert np.std(marked - expected) < 0.02 * np.std(expected - audio)
    # A network that is not trained has frames whose symbols are as probable as others.
    second, first = np.sort(_logits(expected, weights), axis=1)[:, -2:].T
    certain = first - second > 0.02 * np.ptp(first)
    symbols = reading.read_symbols(expected, weights)
    assert certain.mean() > 0.7
    assert len({*symbols[certain]}) > 2
    found = reading.read_symbols(marked, weights)
    np.testing.assert_array_equal(found[certain], symbols[certain])


def _logits(audio, weights):
    """At the level to which `read_symbols` brings all audio."""
    level = (marking.TRAINED_POWER / np.mean(np.square(audio, dtype=np.float64))) ** 0.5
    frames = spectrum.split_frames(audio * np.float32(level), weights.config.n_fft)
    carrier = spectrum.magnitude(spectrum.transform(frames))
    return np.asarray(network.symbol_logits(weights.params, weights.config, carrier))


def test_mark_is_as_far_below_the_speech_as_asked(weights):
    audio = _noise(20_000)
    for sdr in (20.0, 40.0):
        difference = embed(audio, 44_100, weights, KEY, sdr) - audio
        found = 10 * np.log10(np.mean(audio**2) / np.mean(difference**2))
        # Where the carrier is smaller than the mark, less is taken away.
        assert sdr - 1 < found < sdr + 4


def test_mark_depends_on_the_key_and_the_level_does_not_matter(weights):
    audio = _noise(3000)
    marked = embed(audio, 44_100, weights, KEY)
    other = embed(audio, 44_100, weights, (5, 4, 3, 2, 1))
    assert np.abs(marked - other).max() > 1e-4
    louder = embed(4 * audio, 44_100, weights, KEY)
    np.testing.assert_allclose(louder, 4 * marked, atol=1e-5)


def test_nothing_is_compiled_after_the_warm_up(caplog):
    watermark = Watermark(random_weights(dataclasses.replace(tiny(), band=24)), KEY)
    with jax.log_compiles():
        watermark.warm_up(24_000)
        assert caplog.text.count("Finished XLA compilation of jit(_mark_frames)") == 3
        caplog.clear()
        marker = watermark.marker(24_000)
        for size in (100, 17, 40, 1000, 33, 90):
            marker.add(_noise(size))
        marker.finish()
        watermark.embed(_noise(5000), 24_000)
    assert "compilation" not in caplog.text


def test_silence_stays_silent_and_nothing_stays_nothing(weights):
    silence = np.zeros(2000, np.float32)
    np.testing.assert_array_equal(embed(silence, 24_000, weights), silence)
    assert embed(silence[:0], 24_000, weights).shape == (0,)


def test_speech_after_silence_is_marked(weights):
    audio = np.concatenate([np.zeros(3000, np.float32), _noise(3000)])
    marked = embed(audio, 44_100, weights, KEY)
    assert np.isfinite(marked).all()
    assert np.abs(marked - audio)[3500:].max() > 1e-4


def test_bad_audio_and_bad_keys_are_refused(weights):
    with pytest.raises(InputError, match="NaN"):
        embed(np.full(10, np.nan, np.float32), 24_000, weights)
    with pytest.raises(InputError, match="shape"):
        embed(np.zeros((10, 2), np.float32), 24_000, weights)
    for key in [(1, 2, 3, 4), (1, 2, 3, 4, 256), (1, 2, 3, 4, -1)]:
        with pytest.raises(InputError, match="5 numbers"):
            embed(np.zeros(10, np.float32), 24_000, weights, key)


def test_padding_of_the_band_does_not_reach_the_mark(weights):
    """The stream computes fewer bins than the whole: those that the band depends on."""
    config = weights.config
    assert config.num_inputs < config.num_bins
    carrier = np.abs(_noise(5 * config.num_bins)).reshape(5, -1)
    symbols = np.array([1, 2, 3, 4, 0])
    make = jax.jit(network.make_mark, static_argnames=("config", "sdr", "statistics"))
    marks = []
    for bins in (config.num_inputs, config.num_bins):
        part = carrier.copy()
        part[:, bins:] = 100
        marks.append(
            make(weights.params, config, part, symbols, 0.0, Statistics.TRAINED)
            / np.sqrt(np.mean(part**2))
        )
    np.testing.assert_allclose(marks[0], marks[1], rtol=1e-5)
