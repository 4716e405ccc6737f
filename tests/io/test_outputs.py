"""Outputs that are links, pipes and devices: written through, never replaced."""

import os
import shutil
import subprocess
import sys
import threading
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm_jax.cli.output import check_codes_out, save_codes
from csm_jax.errors import OutputError
from csm_jax.io import audio
from csm_jax.io.samples import SAMPLE_RATE

RATE = SAMPLE_RATE
TONE = (0.5 * np.sin(np.arange(12_000) / 10)).astype(np.float32)
PCM = np.rint(TONE * 32_768).astype("<i2").tobytes()


class Reader:
    """Reads a pipe to its end beside the test."""

    def __init__(self, path: Path):
        os.mkfifo(path)
        self._path, self.data = path, b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        self.data = self._path.read_bytes()

    def finish(self) -> bytes:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.data


def save(path: Path) -> None:
    audio.save_audio(path, TONE, RATE)


def stream(path: Path) -> None:
    with audio.open_audio(path, RATE) as write:
        for start in range(0, len(TONE), 1_920):
            write(TONE[start : start + 1_920])


@pytest.mark.parametrize("write", [save, stream])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus", ".pcm"])
def test_a_pipe_gets_the_speech_and_stays(tmp_path, suffix, write):
    path = tmp_path / f"a{suffix}"
    reader = Reader(path)
    audio.check_output(path)
    write(path)
    data = reader.finish()
    assert path.is_fifo()
    assert os.listdir(tmp_path) == [path.name]
    (tmp_path / f"plain{suffix}").write_bytes(data)
    if suffix == ".pcm":
        assert data == PCM
    elif suffix == ".wav" and write is stream:
        assert data == audio.wav_header(RATE) + PCM
    else:
        save(tmp_path / f"same{suffix}")  # Ogg files differ in their random numbers
        wanted, _ = soundfile.read(tmp_path / f"same{suffix}")
        found, rate = soundfile.read(tmp_path / f"plain{suffix}")
        assert rate == RATE
        np.testing.assert_array_equal(found, wanted)


def test_a_pipe_of_samples_gets_them_while_they_are_generated(tmp_path):
    os.mkfifo(tmp_path / "a.pcm")
    descriptor = os.open(tmp_path / "a.pcm", os.O_RDONLY | os.O_NONBLOCK)
    with audio.open_audio(tmp_path / "a.pcm", RATE) as write:
        write(TONE[:100])
        assert os.read(descriptor, 10_000) == PCM[:200]
    os.close(descriptor)


def test_codes_go_into_a_pipe(tmp_path):
    reader = Reader(tmp_path / "a.npy")
    check_codes_out(tmp_path / "a.npy")
    save_codes(tmp_path / "a.npy", np.arange(6, dtype=np.int32).reshape(2, 3))
    (tmp_path / "b.npy").write_bytes(reader.finish())
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("write", [save, stream])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, write, is_there):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "target.wav"
    if is_there:
        target.write_bytes(b"old")
    (tmp_path / "a.wav").symlink_to(target)
    audio.check_output(tmp_path / "a.wav")
    write(tmp_path / "a.wav")
    assert (tmp_path / "a.wav").is_symlink()
    assert not target.is_symlink()
    with wave.open(str(target)) as file:
        assert file.readframes(10**6) == PCM
    assert os.listdir(tmp_path / "real") == ["target.wav"]


def test_a_link_to_a_pipe_is_written_through(tmp_path):
    reader = Reader(tmp_path / "pipe")
    (tmp_path / "a.pcm").symlink_to(tmp_path / "pipe")
    save(tmp_path / "a.pcm")
    assert reader.finish() == PCM
    assert (tmp_path / "a.pcm").is_symlink()


@pytest.mark.parametrize("write", [save, stream])
def test_a_device_is_written_to(tmp_path, write):
    (tmp_path / "a.wav").symlink_to("/dev/null")
    write(tmp_path / "a.wav")
    (tmp_path / "full.wav").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left"):
        write(tmp_path / "full.wav")
    assert Path("/dev/null").is_char_device()


SAVE = """
import sys, numpy as np
from csm_jax.io.audio import save_audio
save_audio(sys.argv[1], np.zeros(9), 24_000)
"""


def test_a_pipe_of_another_process_is_reached_by_its_link(tmp_path):
    """As `>(command)` of a shell, which becomes /dev/fd/63."""
    (tmp_path / "a.pcm").symlink_to("/dev/fd/1")
    command = [sys.executable, "-c", SAVE, tmp_path / "a.pcm"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == bytes(18)


def test_a_pipe_whose_reader_has_gone_is_a_broken_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.pcm")
    descriptor = os.open(tmp_path / "a.pcm", os.O_RDONLY | os.O_NONBLOCK)
    with audio.open_audio(tmp_path / "a.pcm", RATE) as write:
        os.close(descriptor)
        with pytest.raises(BrokenPipeError):
            write(TONE)


def test_a_hard_link_keeps_its_old_content(tmp_path):
    """A replaced file is a new one: the other name keeps what it had."""
    (tmp_path / "a.wav").write_bytes(b"old")
    os.link(tmp_path / "a.wav", tmp_path / "b.wav")
    save(tmp_path / "a.wav")
    assert (tmp_path / "b.wav").read_bytes() == b"old"
    assert soundfile.info(tmp_path / "a.wav").frames == len(TONE)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    command = [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", place]
    if mount is None or umount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield place
    subprocess.run([umount, place], check=True)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg", ".opus", ".pcm"])
def test_a_full_disk_is_one_line_that_says_so(small_disk, suffix):
    noise = np.random.default_rng(0).uniform(-1, 1, 2_000_000).astype(np.float32)
    path = small_disk / f"a{suffix}"
    with pytest.raises(OutputError, match=r"No space left on device\): choose"):
        audio.save_audio(path, noise, RATE)
    with pytest.raises(OutputError, match=r"No space left on device\): choose"):
        stream_all(path, noise)
    assert os.listdir(small_disk) == []


def stream_all(path: Path, samples: np.ndarray) -> None:
    with audio.open_audio(path, RATE) as write:
        for start in range(0, len(samples), 48_000):
            write(samples[start : start + 48_000])
