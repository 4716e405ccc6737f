"""Training recordings of the open-vocabulary codec: levels, sets on disk, batches."""

import dataclasses
import json

import numpy as np
import pytest
from codec_batches import CodecBatches
from levels import LOUDNESS, PEAK, level, trim
from phonemes import SOUNDS
from speech_set import UNIT, Packed, Utterance, read_manifests, unit_labels

import csm_jax
from csm_jax.io.audio import save_audio

RATE = 24_000
CONFIG = csm_jax.tiny().codec
PHONEMES = "əˈAbuː"
DURATIONS = (4, 3, 1, 5, 2, 4, 2, 6)
# The sound of each unit of time that the durations describe.
HEARD = "    əəəAAAAAAbbuuuuuu      "


def buzz(seconds: float) -> np.ndarray:
    return np.sin(np.arange(int(seconds * RATE)) * 0.1).astype(np.float32)


def test_silence_around_speech_is_trimmed_and_counted():
    silence = np.zeros(RATE, np.float32)
    audio = np.concatenate([silence, 0.3 * buzz(2), silence])
    trimmed, start = trim(audio, RATE)
    np.testing.assert_array_equal(trimmed, audio[start : start + len(trimmed)])
    assert start == pytest.approx(0.9 * RATE, abs=0.02 * RATE)
    assert len(trimmed) == pytest.approx(2.3 * RATE, abs=0.02 * RATE)


def test_a_silent_recording_is_not_changed():
    silence = np.zeros(RATE, np.float32)
    assert trim(silence, RATE)[1] == 0
    np.testing.assert_array_equal(level(silence), silence)


@pytest.mark.parametrize("factor", [1e-3, 1, 30])
def test_leveled_recordings_are_equally_loud(factor):
    loud = level(factor * buzz(1))
    assert np.sqrt(np.mean(loud**2)) == pytest.approx(LOUDNESS, rel=1e-3)


def test_a_peak_is_never_clipped():
    click = np.zeros(RATE, np.float32)
    click[100] = 0.5
    assert np.max(level(click)) == pytest.approx(PEAK)


@pytest.fixture
def directory(tmp_path):
    """Two recordings in manifests of two processes; a sample is its unit's number / 100."""
    for i, start in enumerate([1500, 0]):
        units = np.arange(sum(DURATIONS), dtype=np.float32) / 100
        audio = np.repeat(units, UNIT)[start:]
        save_audio(tmp_path / f"{i}.wav", audio, RATE)
        line = {
            "id": i,
            "audio": f"{i}.wav",
            "text": f"text {i}",
            "spoken": f"text number {i}",
            "voice": "somebody",
            "phonemes": PHONEMES,
            "durations": DURATIONS,
            "start": start,
        }
        (tmp_path / f"manifest-{i}.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def test_a_set_is_read_from_all_its_manifests(directory):
    first, second = read_manifests([directory])
    audio = directory / "0.wav"
    spoken = "text number 0"
    assert first == Utterance(
        audio, "text 0", "somebody", PHONEMES, DURATIONS, start=1500, spoken=spoken
    )
    assert second.audio == directory / "1.wav"


def test_an_incomplete_line_is_ignored(directory):
    before = read_manifests([directory])
    with (directory / "manifest-1.jsonl").open("a") as file:
        file.write('{"id": 2, "audio": "2.w')
    assert read_manifests([directory]) == before


def test_labels_of_a_recording_are_those_of_its_units(directory):
    utterance = read_manifests([directory])[1]
    assert "".join(SOUNDS[label] for label in unit_labels(utterance)) == HEARD
    unknown = dataclasses.replace(utterance, start=None)
    assert set(unit_labels(unknown)) == {-1}


def test_batches_have_the_labels_of_their_samples(directory):
    """The sample at the time of a label is in the unit with that label."""
    packed = Packed(directory / "packed", read_manifests([directory]))
    batches = CodecBatches(packed, config=CONFIG, rows=16, frames=3, seed=0)
    size = CONFIG.frame_size
    for number in range(4):
        audio, labels = batches.batch(number)
        assert audio.shape == (16, 3 * size)
        assert labels.shape == (16, 3, 2)
        for row, label in zip(audio, labels.reshape(16, -1), strict=True):
            samples = row[size // 4 :: size // 2]
            if row.min() <= 0:
                continue  # silence after the end, or the first unit, whose loudness is unknown
            # A row is its recording times one factor, which the steps between units show.
            step = np.unique(np.round(np.diff(row), 6))
            factor = step[step > 0].min() / 0.01
            units = np.round(samples / factor * 100).astype(int)
            assert "".join(SOUNDS[i] for i in label) == "".join(HEARD[u] for u in units)


def test_a_batch_depends_only_on_its_number_and_the_seed(directory):
    packed = Packed(directory / "packed", read_manifests([directory]))
    again = Packed(directory / "packed", read_manifests([directory]))
    make = dict(config=CONFIG, rows=2, frames=2)
    one = CodecBatches(packed, seed=1, **make)
    one.batch(3)
    np.testing.assert_array_equal(
        one.batch(5).audio, CodecBatches(again, seed=1, **make).batch(5).audio
    )
    assert not np.array_equal(one.batch(5).audio, one.batch(6).audio)
    other = CodecBatches(packed, seed=2, **make)
    assert not np.array_equal(one.batch(5).audio, other.batch(5).audio)


def test_a_short_recording_is_padded_with_silence(directory):
    packed = Packed(directory / "packed", read_manifests([directory]))
    batches = CodecBatches(packed, config=CONFIG, rows=4, frames=20, seed=0)
    audio, labels = batches.batch(0)
    longest = int(packed.lengths.max())
    assert not audio[:, longest:].any()
    assert (labels[:, -1] == SOUNDS.index(" ")).all()
