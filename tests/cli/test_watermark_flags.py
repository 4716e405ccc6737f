"""Speech of the commands is marked where weights are, and is said not to be where none are."""

import json

import numpy as np
import pytest
import soundfile

from csm_jax.generate import run
from csm_jax.serve.__main__ import run as serve
from csm_jax.watermark import checkpoint, embed, find_weights, finding
from csm_jax.watermark.config import tiny

KEY = (9, 8, 7, 6, 5)
FLAGS = ["--checkpoint=random:tiny", "--max_audio_length_ms=1200", "--seed=3", "--guard=off"]
NOT_MARKED = "speech is not marked as generated"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("CSM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def weights(cache):
    finding.default_file().parent.mkdir(parents=True)
    checkpoint.save(checkpoint.random_weights(tiny()), finding.default_file())
    return find_weights()


def _speak(path, *flags):
    assert run([*FLAGS, "--text=One.", f"--out={path}", *flags]) == 0
    return soundfile.read(path, dtype="float32")[0]


def test_speech_is_marked_by_the_key_at_once_and_in_a_stream(weights, cache, capsys):
    plain = _speak(cache / "plain.wav", "--watermark=off")
    whole = _speak(cache / "whole.wav", "--watermark_key=9,8,7,6,5")
    streamed = _speak(cache / "streamed.wav", "--watermark_key=9,8,7,6,5", "--stream")
    assert NOT_MARKED not in capsys.readouterr().err
    assert np.abs(whole - plain).max() > 0.01
    expected = np.clip(embed(plain, 24_000, weights, KEY), -1, 1)
    np.testing.assert_allclose(whole, expected, atol=1e-3)  # of 16-bit samples
    np.testing.assert_allclose(streamed, whole, atol=2e-3)


def test_files_of_a_manifest_are_marked(weights, cache):
    (cache / "lines.jsonl").write_text(json.dumps({"text": "One.", "id": "one"}))
    flags = [*FLAGS, f"--manifest={cache / 'lines.jsonl'}", "--watermark=on", "--batch=1"]
    assert run([*flags, f"--out_dir={cache}", "--watermark_key=9,8,7,6,5"]) == 0
    marked, _ = soundfile.read(cache / "one.wav", dtype="float32")
    plain = _speak(cache / "plain.wav", "--watermark=off")
    np.testing.assert_allclose(marked, embed(plain, 24_000, weights, KEY).clip(-1, 1), atol=1e-3)


def test_speech_without_weights_is_said_once_not_to_be_marked(cache, capsys):
    demo = "--checkpoint=demo"
    plain = _speak(cache / "plain.wav", demo, "--watermark=off")
    assert NOT_MARKED not in capsys.readouterr().err
    np.testing.assert_array_equal(_speak(cache / "auto.wav", demo), plain)
    error = capsys.readouterr().err
    assert error.count(NOT_MARKED) == 1
    assert "--convert=sony/silentcipher" in error
    assert "license" in error


def test_a_server_without_weights_of_a_mark_does_not_start(cache, capsys):
    pytest.importorskip("uvicorn")
    assert serve(["--checkpoint=none", "--watermark=on"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "there are no weights of a watermark: python -m csm_jax.watermark" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--watermark=on"], "there are no weights of a watermark: python -m csm_jax.watermark"),
        (["--watermark_key=1,2,3,4,5"], "there are no weights of a watermark"),
        (["--watermark=off", "--watermark_key=1,2,3,4,5"], "watermark=off takes no"),
        (["--watermark_key=1"], "5 numbers from 0 to 255"),
        (["--watermark_weights=none.safetensors"], "none.safetensors do not exist"),
    ],
)
def test_what_cannot_be_marked_is_one_line_before_the_model_is_loaded(
    cache, capsys, flags, message
):
    out = cache / "x.wav"
    assert run(["--checkpoint=none", "--text=One.", f"--out={out}", *flags]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not out.exists()
