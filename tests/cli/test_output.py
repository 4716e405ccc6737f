"""The output of `csm_jax.generate`: speech in a pipe or a file, whole or while it is generated."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from fixtures import CONFIG

import csm_jax
from csm_jax import InputError
from csm_jax.generate import run
from csm_jax.inference.request_state import RequestState
from csm_jax.io import audio

RATE = 24_000
FRAME = CONFIG.codec.frame_size
NOISE = "random:tiny: the weights are random, the sound is noise and not speech"
COMMAND = [sys.executable, "-m", "csm_jax.generate"]
FLAGS = ["--checkpoint=random:tiny", "--text=Hi.", "--seed=4", "--guard=off"]
SHORT = [*FLAGS, "--max_audio_length_ms=960"]
NUM_SAMPLES = 12 * FRAME


@pytest.fixture(scope="module")
def offline():
    """The speech of the flags `SHORT`, int16 [num_samples]."""
    model = csm_jax.load("random:tiny")
    speech = model.generate("Hi.", seed=4, guard="off", max_audio_length_ms=960)
    assert len(speech) == NUM_SAMPLES
    return np.frombuffer(audio.to_pcm(speech), "<i2").astype(int)


def assert_is(pcm: bytes, offline: np.ndarray) -> None:
    """Checks up to rounding: the codec rounds single frames slightly differently."""
    samples = np.frombuffer(pcm, "<i2").astype(int)
    assert len(samples) == len(offline)
    assert np.abs(samples - offline).max() <= 1


# --- Pipes --------------------------------------------------------------------------------------


def test_a_pipe_gets_a_header_and_samples_and_nothing_else(offline):
    done = subprocess.run([*COMMAND, *SHORT, "--stream", "--out=-"], capture_output=True)
    assert done.returncode == 0
    written = done.stderr.decode().splitlines()
    assert written[0] == NOISE
    assert [line.split(" at ")[0] for line in written[1:]] == ["the speech was cut"]
    assert done.stdout[:44] == audio.wav_header(RATE)
    assert_is(done.stdout[44:], offline)


@pytest.mark.parametrize("flags", [["--stream"], []])
def test_format_pcm_writes_samples_without_a_header(flags, offline, capsysbinary):
    assert run([*SHORT, *flags, "--out=-", "--format=pcm"]) == 0
    assert_is(capsysbinary.readouterr().out, offline)


def test_without_stream_a_pipe_gets_a_complete_file(offline, capsysbinary):
    assert run([*SHORT, "--out=-"]) == 0
    samples, rate = soundfile.read(io.BytesIO(capsysbinary.readouterr().out), dtype="int16")
    assert rate == RATE
    assert_is(samples.tobytes(), offline)


def test_a_closed_pipe_ends_the_command_quietly():
    """The first samples come long before the last, which would take minutes."""
    flags = [*FLAGS, "--max_audio_length_ms=70000", "--stream", "--out=-"]
    process = subprocess.Popen(
        [*COMMAND, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    head = b""
    while len(head) < 44 + 2 * FRAME:
        block = process.stdout.read(44 + 2 * FRAME - len(head))
        assert block, process.stderr.read().decode()
        head += block
    assert process.poll() is None
    assert head.startswith(audio.wav_header(RATE))
    process.stdout.close()
    written = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(60), written.splitlines()) == (0, [NOISE])


@pytest.mark.parametrize("stream", [["--stream"], []])
@pytest.mark.parametrize("audio_format", ["mp3", "flac", "WAV", ""])
def test_a_pipe_takes_no_other_format(audio_format, stream, capsys):
    assert run([*SHORT, *stream, "--out=-", f"--format={audio_format}"]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    (line,) = written.err.splitlines()
    assert f"--format is {audio_format}, but --out=- takes wav or pcm" in line


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_one_line(unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [*COMMAND, *SHORT, "--stream", "--out=-"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("csm_jax.generate: error: standard output cannot be written: No space")


@pytest.mark.parametrize("stdout", ["terminal", "closed"])
def test_streaming_without_standard_output_is_refused(stdout, monkeypatch, capsys):
    if stdout == "terminal":
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    else:
        monkeypatch.setattr(sys, "stdout", None)
    assert run([*SHORT, "--out=-"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pipe it into a player" in line or "is closed" in line


# --- Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".pcm", ".ogg"])
def test_a_streamed_file_equals_a_saved_one(tmp_path, suffix, offline):
    out, codes = tmp_path / f"a{suffix}", tmp_path / "a.npy"
    assert run([*SHORT, "--stream", f"--out={out}", f"--codes_out={codes}"]) == 0
    samples = audio.load_audio(out, RATE)
    assert set(tmp_path.iterdir()) == {codes, out}
    assert np.load(codes).shape == (12, CONFIG.num_codebooks)
    if suffix == ".ogg":  # lossy
        assert len(samples) == NUM_SAMPLES
        error = samples - offline / 32_768
        assert np.mean(error**2) < 0.2 * np.mean((offline / 32_768) ** 2)
    else:
        assert_is(audio.to_pcm(samples), offline)


def fail_after(num_frames: int):
    accept = RequestState.accept

    def fail(self, codes, attention=None):
        step = accept(self, codes, attention)
        if self._total > num_frames:
            raise InputError("bad luck")
        return step

    return fail


@pytest.mark.parametrize("suffix", [".wav", ".mp3"])
def test_an_error_midway_keeps_the_old_file(tmp_path, suffix, capsys, monkeypatch):
    monkeypatch.setattr(RequestState, "accept", fail_after(2))
    old = tmp_path / f"old{suffix}"
    old.write_bytes(b"precious")
    for out in (old, tmp_path / f"new{suffix}"):
        assert run([*SHORT, "--stream", f"--out={out}", f"--codes_out={tmp_path}/a.npy"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == "csm_jax.generate: error: bad luck"
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"precious"


def test_a_pipe_ends_with_an_error_midway(capfdbinary, monkeypatch):
    monkeypatch.setattr(RequestState, "accept", fail_after(2))
    assert run([*SHORT, "--stream", "--out=-", "--format=pcm"]) == 2
    written = capfdbinary.readouterr()
    assert written.err.decode().splitlines()[-1] == "csm_jax.generate: error: bad luck"
    assert len(written.out) in (2 * FRAME, 4 * FRAME)
