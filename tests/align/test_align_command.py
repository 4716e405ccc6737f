"""`python -m csm_jax.align`: words of a recording with its transcript."""

import json

import numpy as np
import pytest

import csm_jax
from csm_jax.align.__main__ import run
from csm_jax.io.audio import save_audio

TEXT = "four nine one zero"


@pytest.fixture(scope="module")
def speech():
    return csm_jax.load("demo").speak(TEXT, seed=2)


@pytest.fixture
def recording(tmp_path, speech):
    path = tmp_path / "speech.wav"
    save_audio(str(path), speech.audio, speech.sample_rate)
    return path


def test_words_of_its_own_speech_are_those_of_the_generation(tmp_path, recording, speech):
    """The codes of the encoded recording are others, so the times are only near."""
    out = tmp_path / "words.json"
    flags = [f"--audio={recording}", f"--text={TEXT}", f"--out={out}", "--checkpoint=demo"]
    assert run(flags) == 0
    rows = json.loads(out.read_text())
    assert [row["text"] for row in rows] == TEXT.split()
    starts = [word.start for word in speech.words]
    np.testing.assert_allclose([row["start"] for row in rows], starts, atol=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "the text is empty"),
        ({"out": "words.doc"}, "ends in none of .json, .srt, .vtt, .TextGrid"),
        ({"audio": "missing.wav"}, "missing.wav does not exist"),
        ({"checkpoint": "random:tiny"}, "has no alignment.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path, recording, capsys, change, message):
    values = {"audio": recording, "text": TEXT, "out": "words.srt", "checkpoint": "demo"} | change
    values["out"] = tmp_path / values["out"]
    assert run([f"--{name}={value}" for name, value in values.items()]) == 2
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("csm_jax.align: error: ")
    assert message in error
    assert all("random" in warning for warning in warnings)
    assert sorted(tmp_path.iterdir()) == [recording]
