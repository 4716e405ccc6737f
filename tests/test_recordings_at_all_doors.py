"""A recording of another scale is refused wherever it comes in, and a silent one is told of."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from fixtures import CONFIG

import csm_jax
from csm_jax.errors import InputError
from csm_jax.generate import run
from csm_jax.inference.request_state import RequestState
from csm_jax.io.audio import load_audio
from csm_jax.io.samples import check_audio
from csm_jax.prompt.turns import Segment
from csm_jax.train.codes import CodeCache
from csm_jax.train.data import read_conversations

RATE = 24_000
FRAME = CONFIG.codec.frame_size
TONE = (0.4 * np.sin(np.arange(6 * FRAME) / 20)).astype(np.float32)
# float32 in the range of int16, as `scipy.io.wavfile.read(...)[1].astype(float)` gives it.
LOUD = TONE * 32_768
SAYS = r"a peak of 1\.31e\+04, but float samples go from -1 to 1; divide by 32768"


@pytest.fixture(scope="module")
def model():
    return csm_jax.load("random:tiny")


@pytest.fixture
def files(tmp_path):
    soundfile.write(tmp_path / "loud.wav", LOUD, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "loud.w64", LOUD, 2 * RATE, format="W64", subtype="DOUBLE")
    soundfile.write(tmp_path / "silent.wav", np.zeros(3 * FRAME), RATE)
    return tmp_path


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_of_another_scale_are_refused(model, dtype):
    turn = Segment(0, "Before.", LOUD.astype(dtype))
    for use in (
        lambda: check_audio(turn.audio),
        lambda: model.encode(turn.audio),
        lambda: model.codec.encode([TONE, turn.audio]),
        lambda: model.generate("Hi.", context=[turn]),
        lambda: next(model.stream("Hi.", context=[turn])),
        lambda: model.generate_batch([csm_jax.Request("Hi.", context=[turn])]),
    ):
        with pytest.raises(InputError, match=SAYS):
            use()


def test_turns_that_are_left_out_are_checked_too(model):
    """The window is full after the newer turns."""
    turns = [Segment(0, "Before.", LOUD), *[Segment(0, "Before.", TONE)] * 40]
    with pytest.raises(InputError, match=SAYS):
        RequestState(model, csm_jax.Request("Hi.", context=turns))


@pytest.mark.parametrize("name", ["loud.wav", "loud.w64"])
def test_files_of_another_scale_are_refused(files, name):
    with pytest.raises(InputError, match=SAYS):
        load_audio(files / name, RATE)


def test_training_data_of_another_scale_are_refused(files, model):
    path = files / "loud.wav"
    error = CodeCache(files / "cache", model.codec, CONFIG.num_codebooks).codes([path])[path]
    assert isinstance(error, InputError)
    with pytest.raises(InputError, match=SAYS):
        raise error


def test_int16_has_the_codes_of_its_floats(model):
    samples = np.rint(LOUD).astype(np.int16)
    wanted = model.encode(samples / np.float32(32_768))
    np.testing.assert_array_equal(model.encode(samples), wanted)
    assert len(np.unique(wanted)) > 5


def test_a_little_over_full_scale_is_no_other_scale(model):
    assert model.encode(TONE * 4.9).shape == (6, CONFIG.num_codebooks)


@pytest.mark.parametrize("level", [0.0, 9e-4])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_silence_as_context_is_told(model, level, offset):
    """Also an offset without a sound."""
    notices = []
    turns = [Segment(0, "Before.", TONE), Segment(1, "Then.", TONE / 0.4 * level + offset)]
    request = csm_jax.Request("Hi.", context=turns, guard="off", max_audio_length_ms=80)
    model.generate(request, notify=notices.append)
    told = [notice.message for notice in notices if notice.kind == "silent_context"]
    assert told == ["the recording of turn 2 of the context is silent: record it louder"]


def test_a_quiet_recording_is_no_silence(model):
    notices = []
    turn = Segment(0, "Before.", TONE * 0.01)
    model.generate("Hi.", context=[turn], max_audio_length_ms=80, notify=notices.append)
    assert "silent_context" not in [notice.kind for notice in notices]


def test_the_command_tells_of_silence(files, capsys):
    flags = ["--checkpoint=random:tiny", "--max_audio_length_ms=80", "--guard=off"]
    context = [f"--context_audio={files}/silent.wav", "--context_text=Before."]
    assert run([*flags, "--text=Hi.", f"--out={files}/a.wav", *context]) == 0
    assert "turn 1 of the context is silent" in capsys.readouterr().err
    line = {"text": "Hi.", "context": [{"speaker": 0, "text": "Before.", "audio": "silent.wav"}]}
    (files / "lines.jsonl").write_text(2 * f"{json.dumps(line)}\n")
    assert run([*flags, f"--manifest={files}/lines.jsonl", f"--out_dir={files}/out"]) == 0
    assert capsys.readouterr().err.count("silent.wav is silent: record it louder") == 2


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_a_lossless_recording_of_a_phone_is_that_of_its_wav_file(tmp_path, model):
    """As a file, as training data, in a directory of pairs, and as context of the command."""
    soundfile.write(tmp_path / "a.wav", TONE, RATE)
    command = ["ffmpeg", "-v", "error", "-i", "a.wav", "-c:a", "alac", "a.m4a"]
    subprocess.run(command, cwd=tmp_path, check=True)
    wav, m4a = tmp_path / "a.wav", tmp_path / "a.m4a"
    np.testing.assert_array_equal(load_audio(m4a, RATE), load_audio(wav, RATE))
    codes = CodeCache(tmp_path / "cache", model.codec, CONFIG.num_codebooks).codes([wav, m4a])
    np.testing.assert_array_equal(codes[m4a], codes[wav])
    (tmp_path / "a.txt").write_text("Before.")
    conversations, problems = read_conversations(tmp_path)
    assert not problems
    assert [turn.audio for each in conversations for turn in each.turns] == [m4a, wav]
    flags = ["--checkpoint=random:tiny", "--text=Hi.", "--max_audio_length_ms=400", "--guard=off"]
    for path in (wav, m4a):
        context = [f"--context_audio={path}", "--context_text=Before.", f"--out={tmp_path}/out.wav"]
        assert run([*flags, *context, f"--codes_out={path}.npy"]) == 0
    np.testing.assert_array_equal(np.load(f"{m4a}.npy"), np.load(f"{wav}.npy"))
