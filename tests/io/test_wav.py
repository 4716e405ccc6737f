"""WAV files as recorders and pipes leave them are read as the ffmpeg command reads them."""

import io
import shutil
import struct
import subprocess
import wave

import numpy as np
import pytest
import soundfile

from csm_jax.errors import InputError
from csm_jax.io.audio import load_audio
from csm_jax.serve.audio.decoding import decode_recording
from csm_jax.serve.settings import Limits

RATE = 24_000


def tone(seconds: float = 0.5, frequency: float = 440) -> np.ndarray:
    """int16 [n]"""
    time = np.arange(int(seconds * RATE)) / RATE
    return (16_000 * np.sin(2 * np.pi * frequency * time)).astype("<i2")


def written(samples: np.ndarray) -> bytearray:
    """A file of Python's `wave`, whose head has 44 bytes."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, RATE, len(samples), "NONE", ""))
        writer.writeframes(samples.tobytes())
    return bytearray(file.getvalue())


def with_sizes(riff: int, data: int) -> bytes:
    file = written(tone())
    file[4:8], file[40:44] = struct.pack("<I", riff), struct.pack("<I", data)
    return bytes(file)


LARGEST = 0xFFFFFFFF
SIZES = [(0, 0), (36, 0), (LARGEST, LARGEST), (0, LARGEST), (LARGEST, 0), (0, 24_000)]
SIZES += [(2**31 - 1, 2**31 - 37)]


@pytest.mark.parametrize(("riff", "data"), SIZES)
def test_a_file_without_its_length_is_read_to_its_end(riff, data, tmp_path):
    content = with_sizes(riff, data)
    (tmp_path / "a.wav").write_bytes(content)
    wanted = tone() / np.float32(32_768)
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", RATE), wanted)
    np.testing.assert_array_equal(decode_recording(content, Limits()), wanted)
    if shutil.which("ffmpeg"):
        command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-f", "s16le", "-"]
        done = subprocess.run(command, capture_output=True, check=True)
        np.testing.assert_array_equal(np.frombuffer(done.stdout, "<i2"), tone())


@pytest.mark.parametrize("unknown", [0, 2**64 - 1])
def test_a_file_of_64_bit_lengths_without_them_is_read_to_its_end(unknown, tmp_path):
    """As recorders leave one that was not closed."""
    soundfile.write(tmp_path / "a.wav", tone(), RATE, format="RF64")
    file = bytearray((tmp_path / "a.wav").read_bytes())
    assert (file[:4], file[12:16]) == (b"RF64", b"ds64")
    file[20:36] = struct.pack("<QQ", unknown, unknown)
    (tmp_path / "a.wav").write_bytes(file)
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", RATE) * 32_768, tone())


def test_chunks_before_the_samples_do_not_matter(tmp_path):
    file = with_sizes(0, 0)
    info = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    (tmp_path / "a.wav").write_bytes(file[:12] + info + file[12:])
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", RATE) * 32_768, tone())


@pytest.mark.parametrize("rest", [b"", b"LIST\x04\0\0\0INFO", b"id3 \x04\0\0\0abcd"])
def test_a_file_without_samples_is_empty(rest, tmp_path):
    (tmp_path / "a.wav").write_bytes(bytes(written(tone(0))) + rest)
    with pytest.raises(InputError, match="no samples"):
        load_audio(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize("length", [12_000, 12_001])
def test_two_files_one_after_another_are_one_clear_line(length, tmp_path):
    """libsndfile reads the first of them, without a word."""
    first = written(tone(length / RATE))
    content = bytes(first + written(tone(0.5, 880)))
    (tmp_path / "a.wav").write_bytes(content)
    message = f"a second WAV file begins at byte {len(first)}"
    with pytest.raises(InputError, match=message):
        load_audio(tmp_path / "a.wav", RATE)
    with pytest.raises(InputError, match=message):
        decode_recording(content, Limits())


def test_metadata_behind_the_samples_is_no_sound(tmp_path):
    file = written(tone()) + b"LIST" + struct.pack("<I", 4) + b"INFO"
    (tmp_path / "a.wav").write_bytes(file)
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", RATE) * 32_768, tone())


@pytest.mark.parametrize("size", [7, 11, 12, 19, 20, 36, 43, 44])
def test_a_cut_head_is_one_line(size, tmp_path):
    (tmp_path / "a.wav").write_bytes(with_sizes(0, 0)[:size])
    with pytest.raises(InputError) as caught:
        load_audio(tmp_path / "a.wav", RATE)
    assert "\n" not in str(caught.value)
