"""Audio files: formats, rates and levels, and the recordings and outputs that are refused."""

import contextlib
import errno
import os
import resource
import stat

import numpy as np
import pytest
import soundfile

from csm_jax.errors import InputError, OutputError
from csm_jax.io import audio
from csm_jax.io.samples import SAMPLE_RATE, check_audio
from csm_jax.serve.audio.decoding import decode_recording
from csm_jax.serve.settings import Limits

RATE = SAMPLE_RATE
SUFFIXES = [".wav", ".flac", ".mp3", ".ogg", ".opus", ".pcm", ".raw"]


def sine(frequency, seconds, rate=RATE, amplitude=0.5):
    """float32 [seconds * rate]."""
    time = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def chirp(seconds=2.0):
    """300 to 1800 Hz with a Gaussian envelope, which every delay changes, unlike a sine."""
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * (300 * time + 750 * time**2 / seconds)
    return (0.6 * np.exp(-(((time / seconds - 0.5) / 0.2) ** 2)) * np.sin(phase)).astype(np.float32)


def snr_db(expected, actual):
    noise = np.mean((actual - expected).astype(np.float64) ** 2)
    return 10 * np.log10(np.mean(expected.astype(np.float64) ** 2) / noise)


def delayed(samples, delay):
    """`samples`, delayed by a fractional number of samples."""
    shift = np.exp(-2j * np.pi * np.fft.rfftfreq(len(samples)) * delay)
    return np.fft.irfft(np.fft.rfft(samples) * shift, len(samples))


def peak_frequency(samples, rate=RATE):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * rate / len(samples)


@contextlib.contextmanager
def one_line(error, *parts):
    """Checks that the block raises `error` with a message of one line that contains all `parts`."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


# Reading


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_resampling_gives_the_closed_form_sine(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", sine(1000, 1.0, rate), rate, subtype="FLOAT")
    loaded = audio.load_audio(tmp_path / "a.wav", RATE)
    assert loaded.dtype == np.float32
    assert loaded.shape == (RATE,)
    inner = slice(1200, -1200)  # the start and the end are steps for the filter
    np.testing.assert_allclose(loaded[inner], sine(1000, 1.0)[inner], atol=1e-4)


def test_frequencies_above_the_new_nyquist_do_not_alias(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(15_000, 1.0, 48_000), 48_000, subtype="FLOAT")
    assert np.abs(audio.load_audio(tmp_path / "a.wav", RATE)[1200:-1200]).max() < 1e-4


def test_load_audio_resamples_to_the_requested_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(440, 1.0, 24_000), 24_000)
    loaded = audio.load_audio(tmp_path / "a.wav", 16_000)
    assert loaded.shape == (16_000,)
    assert peak_frequency(loaded, 16_000) == pytest.approx(440, abs=1)


def test_channels_are_averaged(tmp_path):
    channels = np.stack([sine(200, 0.5), sine(300, 0.5), sine(500, 0.5)], axis=1)
    soundfile.write(tmp_path / "a.wav", channels, RATE, subtype="FLOAT")
    expected = (channels[:, 0] + channels[:, 1] + channels[:, 2]) / 3
    np.testing.assert_allclose(audio.load_audio(tmp_path / "a.wav", RATE), expected, atol=1e-7)


@pytest.mark.parametrize("name", ["a.pcm", "a.raw", "A.PCM"])
def test_raw_audio_is_little_endian_16_bit(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00\x00\x00\x40\x01\x00\x00\x80\xff\x7f")
    expected = np.array([0, 0.5, 1 / 32768, -1, 32767 / 32768], np.float32)
    np.testing.assert_array_equal(audio.load_audio(tmp_path / name, RATE), expected)


def test_the_content_decides_the_format(tmp_path):
    soundfile.write(tmp_path / "a.flac", sine(440, 0.1), RATE)
    os.rename(tmp_path / "a.flac", tmp_path / "a.mp3")
    assert snr_db(sine(440, 0.1), audio.load_audio(tmp_path / "a.mp3", RATE)) > 80


def write_nothing(path):
    path.write_bytes(b"")


def write_text(path):
    path.write_text("no sound here\n" * 100)


def write_noise(path):
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def write_no_samples(path):
    soundfile.write(path, np.zeros(0, np.float32), RATE, format="WAV")


def write_cut_header(path):
    soundfile.write(path, sine(440, 0.1), RATE, format="WAV")
    path.write_bytes(path.read_bytes()[:30])


def write_cut_flac(path):
    soundfile.write(path, chirp(), RATE, format="FLAC")
    path.write_bytes(path.read_bytes()[:10_000])


def write_nan(path):
    samples = sine(440, 0.1)
    samples[7] = np.nan
    soundfile.write(path, samples, RATE, format="WAV", subtype="FLOAT")


def write_infinities(path):
    soundfile.write(path, np.array([[np.inf, -np.inf]] * 9), RATE, format="WAV", subtype="FLOAT")


def write_one_sample_of_1_ghz(path):
    soundfile.write(path, np.ones(1, np.float32), 1_000_000_000, format="WAV")


def write_one_hz(path):
    soundfile.write(path, sine(440, 0.1), 1)


def write_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")


def write_page(path):
    path.write_text("<!DOCTYPE html>\n<html></html>")


def write_odd(path):
    path.write_bytes(b"\0\0\0")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("missing.wav", lambda path: None, "No such file"),
        ("directory.wav", lambda path: path.mkdir(), "directory"),
        ("nothing.wav", write_nothing, "empty"),
        ("nothing.pcm", write_nothing, "no samples"),
        ("text.wav", write_text, "not readable as audio"),
        ("noise.mp3", write_noise, "not readable as audio"),
        ("no_samples.wav", write_no_samples, "no samples"),
        ("cut_header.wav", write_cut_header, "not readable as audio"),
        ("cut.flac", write_cut_flac, "not readable as audio"),
        ("nan.wav", write_nan, "1 of 2400 samples"),
        ("infinities.wav", write_infinities, "9 of 9 samples"),
        ("fast.wav", write_one_sample_of_1_ghz, "1000000000 Hz"),
        ("slow.wav", write_one_hz, "1 Hz"),
        ("pointer.wav", write_pointer, "git lfs pull"),
        ("page.mp3", write_page, "a web page"),
        ("odd.pcm", write_odd, "3 bytes"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, write, says):
    write(tmp_path / name)
    with one_line(InputError, tmp_path / name, says):
        audio.load_audio(tmp_path / name, RATE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_refused_in_one_line(tmp_path):
    audio.save_audio(tmp_path / "a.wav", sine(440, 0.1), RATE)
    os.chmod(tmp_path / "a.wav", 0)
    with one_line(InputError, tmp_path / "a.wav", "Permission denied"):
        audio.load_audio(tmp_path / "a.wav", RATE)


def test_a_flac_stream_without_its_length_is_read_to_its_end(tmp_path):
    """Its head has 0 as the number of samples, as ffmpeg writes one into a pipe."""
    audio.save_audio(tmp_path / "a.flac", sine(440, 1.5), RATE)
    wanted = audio.load_audio(tmp_path / "a.flac", RATE)
    file = bytearray((tmp_path / "a.flac").read_bytes())
    # The 36 bits before the checksum of STREAMINFO, which begins at byte 8.
    file[21] &= 0xF0
    file[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(file)
    np.testing.assert_array_equal(audio.load_audio(tmp_path / "a.flac", RATE), wanted)
    np.testing.assert_array_equal(decode_recording(bytes(file), Limits()), wanted)


def test_a_coding_that_can_only_be_read_forwards_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(440, 1.5), RATE, subtype="GSM610")
    read = audio.load_audio(tmp_path / "a.wav", RATE)
    assert abs(len(read) - len(sine(440, 1.5))) <= 640  # blocks of 320


# Arrays


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_arrays_become_float32(dtype):
    checked = check_audio(np.array([0.5, -0.25, 1.5], dtype))
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, [0.5, -0.25, 1.5])


@pytest.mark.parametrize("dtype", ["<i2", ">i2"])
def test_int16_arrays_are_scaled(dtype):
    checked = check_audio(np.array([-32768, 0, 16384], dtype))
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, [-1, 0, 0.5])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 5), np.float32), "(2, 5)"),
        (np.float32(1), "()"),
        ("a.wav", "load_audio"),
        (np.zeros(5, np.int32), "int32"),
        (np.zeros(5, np.uint8), "uint8"),
        (np.zeros(5, np.complex64), "complex64"),
        (np.array([0, np.nan, np.inf], np.float32), "2 of 3"),
        (np.array([1e300]), "1 of 1"),
        (np.zeros(0, np.float32), "no samples"),
        ([], "no samples"),
        ((24_000, np.zeros(5, np.float32)), "give those alone"),
    ],
)
def test_bad_arrays_are_refused_in_one_line(array, says):
    with one_line(InputError, says):
        check_audio(array)


# Writing


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".WAV"])
def test_audio_is_equal_after_writing_and_reading(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    audio.save_audio(path, chirp(), RATE)
    loaded = audio.load_audio(path, RATE)
    assert len(loaded) == len(chirp())
    lossy = suffix in (".mp3", ".ogg", ".opus")
    # The speech mode of libopus shifts by about a sample.
    delays = np.arange(-2, 2, 0.25) if suffix == ".opus" else [0]
    snr = max(snr_db(delayed(chirp(), delay), loaded) for delay in delays)
    assert snr > (25 if lossy else 75)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus"])
def test_pitch_and_rate_are_kept(tmp_path, suffix):
    audio.save_audio(tmp_path / f"a{suffix}", sine(1000, 2.0), RATE)
    assert soundfile.info(tmp_path / f"a{suffix}").samplerate == RATE
    samples, rate = soundfile.read(tmp_path / f"a{suffix}")
    assert peak_frequency(samples, rate) == pytest.approx(1000, abs=0.5)


@pytest.mark.parametrize(
    ("suffix", "container", "coding"),
    [
        (".wav", "WAV", "PCM_16"),
        (".flac", "FLAC", "PCM_16"),
        (".mp3", "MP3", "MPEG_LAYER_III"),
        (".ogg", "OGG", "VORBIS"),
        (".opus", "OGG", "OPUS"),
    ],
)
def test_the_suffix_names_the_format(tmp_path, suffix, container, coding):
    audio.save_audio(tmp_path / f"a{suffix}", sine(440, 0.1), RATE)
    info = soundfile.info(tmp_path / f"a{suffix}")
    assert (info.format, info.subtype, info.channels) == (container, coding, 1)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".pcm"])
def test_all_16_bit_values_are_written_exactly(tmp_path, suffix):
    values = np.arange(-32768, 32768).astype(np.int16)
    audio.save_audio(tmp_path / f"a{suffix}", values / np.float32(32768), RATE)
    loaded = audio.load_audio(tmp_path / f"a{suffix}", RATE)
    np.testing.assert_array_equal(loaded * 32768, values)
    assert audio.encode_audio(values, RATE, suffix) == audio.encode_audio(loaded, RATE, suffix)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_beyond_full_scale_are_clipped(tmp_path, suffix):
    loud, clipped = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    audio.save_audio(loud, sine(440, 0.5, amplitude=5.0), RATE)
    audio.save_audio(clipped, np.clip(sine(440, 0.5, amplitude=5.0), -1, 1), RATE)
    samples = audio.load_audio(loud, RATE)
    np.testing.assert_array_equal(samples, audio.load_audio(clipped, RATE))
    assert (samples[:6000].max(), samples[:6000].min()) == pytest.approx((1, -1), abs=0.2)


def test_full_scale_does_not_overflow():
    data = audio.encode_audio(np.array([1, 2, -1, -2, 0.99999], np.float32), RATE, ".pcm")
    np.testing.assert_array_equal(np.frombuffer(data, "<i2"), [32767, 32767, -32768, -32768, 32767])


@pytest.mark.parametrize("suffix", [".ogg", ".opus", ".mp3"])
def test_two_minutes_are_written(suffix):
    """libsndfile's Vorbis encoder crashes, and Python with it, if two minutes are one call."""
    seconds = 150 if suffix == ".ogg" else 20
    data = audio.encode_audio(np.tile(sine(1000, 1.0), seconds), RATE, suffix)
    assert len(data) > 1000 * seconds / 2


@pytest.mark.parametrize("suffix", [".wav", ".ogg", ".pcm", ".raw"])
def test_an_empty_recording_is_an_empty_file(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    audio.save_audio(path, np.zeros(0, np.float32), RATE)
    if suffix in (".pcm", ".raw"):
        assert path.read_bytes() == b""
    else:
        assert soundfile.info(path).frames == 0


@pytest.mark.parametrize("suffix", [".flac", ".mp3", ".opus"])
def test_an_empty_recording_is_one_silent_sample_in_formats_without_empty_files(tmp_path, suffix):
    audio.save_audio(tmp_path / f"a{suffix}", np.zeros(0, np.float32), RATE)
    samples, _ = soundfile.read(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(samples, [0], atol=1e-6)


def test_an_existing_file_is_replaced_and_readable_by_others(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"old")
    (tmp_path / "plain").write_bytes(b"")
    audio.save_audio(str(tmp_path / "a.wav"), sine(440, 0.1), RATE)
    assert len(audio.load_audio(str(tmp_path / "a.wav"), RATE)) == 2400
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("a.wav", "plain")]
    assert modes[0] == modes[1]


def test_a_bare_file_name_is_written_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    audio.check_output("a.wav")
    audio.save_audio("a.wav", sine(440, 0.1), RATE)
    assert os.listdir(tmp_path) == ["a.wav"]


# Refusing to write


def refusals(path, *says):
    """Checks that both `check_output` and writing refuse `path`."""
    with one_line(OutputError, path, *says):
        audio.check_output(path)
    with one_line(OutputError, path, *says):
        audio.save_audio(path, sine(440, 0.1), RATE)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.wav.bak", ".wav"])
def test_the_error_of_an_unknown_format_lists_the_known_ones(tmp_path, name):
    refusals(tmp_path / name, *SUFFIXES)
    assert not list(tmp_path.iterdir())


def test_a_directory_is_refused(tmp_path):
    (tmp_path / "a.wav").mkdir()
    refusals(tmp_path / "a.wav", "is a directory")
    assert not list((tmp_path / "a.wav").iterdir())


def test_a_missing_directory_is_refused(tmp_path):
    refusals(tmp_path / "missing" / "a.wav", tmp_path / "missing", "No such file or directory")
    assert not list(tmp_path.iterdir())


def test_a_file_for_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refusals(tmp_path / "file" / "a.wav", "Not a directory")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_directory_that_even_root_cannot_write_is_refused():
    refusals("/proc/self/a.wav")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_forbidden_directory_is_refused(tmp_path):
    os.chmod(tmp_path, 0o500)
    refusals(tmp_path / "a.wav", "Permission denied")


def test_check_output_creates_no_file(tmp_path):
    audio.check_output(tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.wav").write_bytes(b"old")
    audio.check_output(tmp_path / "a.wav")
    assert (tmp_path / "a.wav").read_bytes() == b"old"


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failing_rename_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full_disk)
    with one_line(OutputError, tmp_path / "a.wav", "No space left on device"):
        audio.save_audio(tmp_path / "a.wav", sine(440, 0.1), RATE)
    assert os.listdir(tmp_path) == ["a.wav"]
    assert (tmp_path / "a.wav").read_bytes() == b"old"


@pytest.mark.parametrize("old", [None, b"old"])
def test_an_interrupted_write_leaves_no_partial_file(tmp_path, old):
    """A limit on file sizes fails like a full disk: in the middle of the data."""
    if old:
        (tmp_path / "a.wav").write_bytes(old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with one_line(OutputError, tmp_path / "a.wav", os.strerror(errno.EFBIG)):
            audio.save_audio(tmp_path / "a.wav", sine(440, 1.0), RATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([old] if old else [])


def test_a_keyboard_interrupt_leaves_no_partial_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        audio.save_audio(tmp_path / "a.wav", sine(440, 0.1), RATE)
    assert not list(tmp_path.iterdir())


def test_a_sample_rate_that_the_format_does_not_support_is_refused(tmp_path):
    with one_line(OutputError, ".opus", "22050 Hz"):
        audio.save_audio(tmp_path / "a.opus", sine(440, 0.1, 22_050), 22_050)
    assert not list(tmp_path.iterdir())


def test_audio_that_is_not_finite_is_not_written(tmp_path):
    with one_line(InputError, "1 of 1"):
        audio.save_audio(tmp_path / "a.wav", np.array([np.nan], np.float32), RATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".opus", ".mp3", ".ogg"])
def test_the_overshoot_of_a_lossy_coding_is_no_other_scale(tmp_path, suffix):
    """A square wave at full scale, cut by a microphone, comes back with higher peaks."""
    audio.save_audio(tmp_path / f"a{suffix}", np.sign(sine(440, 0.5)), RATE)
    samples, _ = soundfile.read(tmp_path / f"a{suffix}")
    assert np.abs(samples).max() > 1
    assert np.abs(audio.load_audio(tmp_path / f"a{suffix}", RATE)).max() <= 2
