"""Audio files that are written block by block."""

import io

import numpy as np
import pytest
import soundfile
from fixtures import CONFIG

from csm_jax import InputError, OutputError
from csm_jax.io import audio

RATE = 24_000
FRAME = CONFIG.codec.frame_size


# --- audio.open_audio and audio.wav_header ------------------------------------------------------


def test_the_header_is_that_of_a_wav_of_unknown_length():
    header = audio.wav_header(RATE)
    assert len(header) == 44
    whole = header + audio.to_pcm(np.linspace(-1, 1, 1000))
    form = soundfile.info(io.BytesIO(whole))
    assert (form.format, form.subtype, form.channels, form.samplerate) == ("WAV", "PCM_16", 1, RATE)
    samples, _ = soundfile.read(io.BytesIO(whole), frames=1000, dtype="int16")
    np.testing.assert_array_equal(samples, np.frombuffer(whole[44:], "<i2"))
    for start in (4, 40):  # the lengths of the file and of the samples
        assert header[start : start + 4] == b"\xff\xff\xff\xff"


def test_samples_are_little_endian_and_clipped():
    samples = np.array([0, 0.5, 1, 2, -1, -2], np.float32)
    expected = [0, 16384, 32767, 32767, -32768, -32768]
    np.testing.assert_array_equal(np.frombuffer(audio.to_pcm(samples), "<i2"), expected)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus", ".pcm", ".raw"])
def test_blocks_make_the_file_of_their_concatenation(tmp_path, suffix):
    tone = (0.5 * np.sin(np.arange(RATE) / 30)).astype(np.float32)
    with audio.open_audio(tmp_path / f"a{suffix}", RATE) as write:
        for block in np.split(tone, [1920, 1920, 9600]):
            write(block)
    audio.save_audio(tmp_path / f"b{suffix}", tone, RATE)
    streamed, saved = (audio.load_audio(tmp_path / f"{name}{suffix}", RATE) for name in "ab")
    atol = 0 if suffix in (".wav", ".flac", ".pcm", ".raw") else 0.02
    np.testing.assert_allclose(streamed, saved, atol=atol)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus", ".pcm"])
def test_without_blocks_the_recording_is_empty(tmp_path, suffix):
    with audio.open_audio(tmp_path / f"a{suffix}", RATE):
        pass
    audio.save_audio(tmp_path / f"b{suffix}", np.zeros(0, np.float32), RATE)
    saved = (tmp_path / f"b{suffix}").stat().st_size
    assert (tmp_path / f"a{suffix}").stat().st_size == saved
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file(tmp_path, error):
    (tmp_path / "a.wav").write_bytes(b"old")

    def fail():
        with audio.open_audio(tmp_path / "a.wav", RATE) as write:
            write(np.zeros(FRAME, np.float32))
            raise error("no more")

    with pytest.raises(error, match="no more"):
        fail()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("name", ["a.txt", "missing/a.wav", ""])
def test_files_that_cannot_be_written_are_refused_before_the_block(tmp_path, name):
    with pytest.raises(OutputError), audio.open_audio(tmp_path / name, RATE):
        pytest.fail("the block was entered")
    assert not list(tmp_path.iterdir())
