"""python -m csm_jax.watermark answers in one line."""

import numpy as np
import pytest
from pitches import KEY, RATE, read_pitches, tones

from csm_jax.io.audio import save_audio
from csm_jax.watermark import PUBLIC_KEY, __main__, checkpoint
from csm_jax.watermark.__main__ import describe, run
from csm_jax.watermark.config import tiny
from csm_jax.watermark.decision import Detection, Verdict


@pytest.fixture
def weights(tmp_path):
    checkpoint.save(checkpoint.random_weights(tiny()), tmp_path / "w.safetensors")
    return f"--watermark_weights={tmp_path / 'w.safetensors'}"


def _noise(seconds):
    return 0.1 * np.random.default_rng(0).normal(size=int(24_000 * seconds)).astype(np.float32)


def _answer(capsys, *flags):
    assert run(flags) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return line


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "opus", "pcm", "raw"])
def test_noise_in_every_format_has_no_mark(tmp_path, capsys, weights, suffix):
    path = tmp_path / f"noise.{suffix}"
    save_audio(path, _noise(0.5), 24_000)
    assert _answer(capsys, f"--audio={path}", weights).startswith(f"{path}: no mark was found")


def test_silent_and_short_recordings_are_said_to_be(tmp_path, capsys, weights):
    for name, audio in {"silent": np.zeros(50_000, np.float32), "short": _noise(0.01)}.items():
        save_audio(tmp_path / f"{name}.wav", audio, 24_000)
    assert "silent: there is no sound" in _answer(
        capsys, f"--audio={tmp_path / 'silent.wav'}", weights
    )
    short = _answer(capsys, f"--audio={tmp_path / 'short.wav'}", weights)
    assert "too short to tell: 0.0 s, and a mark is found in 0.2" in short


def test_stereo_at_another_rate_is_read(tmp_path, capsys, weights):
    import soundfile

    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([_noise(0.5), _noise(0.5)], axis=1), 8000)
    assert "no mark was found" in _answer(capsys, f"--audio={path}", weights)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_marked_recording_is_told_with_its_key(tmp_path, monkeypatch, capsys, weights, suffix):
    import soundfile

    read_pitches(monkeypatch)
    path = tmp_path / f"marked.{suffix}"
    soundfile.write(path, np.stack([tones(300)] * 2, axis=1), RATE)
    answers = {
        flag: _answer(capsys, f"--audio={path}", weights, *flag)
        for flag in [(), ("--watermark_key=17,202,5,99,240",), ("--watermark_key=1,2,3,4,5",)]
    }
    told, right, wrong = answers.values()
    assert told.startswith(f"{path}: marked by the key, 17,202,5,99,240; ")
    assert right == told
    assert wrong.startswith(f"{path}: marked by another key, 17,202,5,99,240; ")


@pytest.mark.parametrize(
    ("found", "given", "answer"),
    [
        (PUBLIC_KEY, None, "marked by the public key of Sesame's code, 212,211,146,56,201; 97% of"),
        (KEY, None, "marked by the key, 17,202,5,99,240; 97% of its symbols agree"),
        (KEY, KEY, "marked by the key, 17,202,5,99,240"),
        (KEY, PUBLIC_KEY, "marked by another key, 17,202,5,99,240"),
        (PUBLIC_KEY, KEY, "marked by another key, 212,211"),
    ],
)
def test_a_mark_is_told_with_its_key(found, given, answer):
    detection = Detection(Verdict.MARKED, found, 0.97, 1e-20)
    assert describe(detection, _noise(1), 6.0, given, 1.0).startswith(answer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --audio or --convert"),
        (["--audio=x.wav", "--convert=y"], "give either --audio or --convert"),
        (["--audio=x.wav"], "there are no weights"),
        (["--audio=x.wav", "--watermark_weights=none"], "watermark weights none do not exist"),
        (["--audio=x.wav", "--watermark_key=1,2,3"], "5 numbers from 0 to 255"),
        (["--audio=x.wav", "--watermark_key=1,2,3,4,x"], "five numbers from 0 to 255"),
        (["--audio=x.wav", "--watermark_key=1,2,3,4,300"], "5 numbers from 0 to 255"),
        (["--convert=no such place"], "neither a directory nor a name on the hub"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setenv("CSM_JAX_CACHE", str(tmp_path))
    assert run(flags) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"{__main__.PROGRAM}: error: ")
    assert message in error


def test_missing_recordings_are_one_line(tmp_path, capsys, weights):
    assert run([f"--audio={tmp_path / 'missing.wav'}", weights]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "cannot be read" in error
