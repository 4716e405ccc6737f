"""The training run of the open-vocabulary codec, which can be interrupted and resumed."""

import json

import numpy as np
import pytest
import sizes
import texts
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import load_file

import csm_jax
from csm_jax.errors import InputError
from csm_jax.io.audio import save_audio
from csm_jax.train.log import read_metrics

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("lenient")]


@pytest.fixture(scope="module")
def script():
    """The script with a codec small enough for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "VOICE_CODEC", csm_jax.tiny().codec)
        import train_voice_codec

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        yield train_voice_codec


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Recordings of noise, some of them held out."""
    directory = tmp_path_factory.mktemp("speech")
    random = np.random.default_rng(0)
    lines = []
    held_out = 0
    number = 0
    while held_out < 2 or len(lines) < 6:
        text = f"text {number}"
        number += 1
        is_held = texts.is_held_out_text(text)
        if len(lines) - held_out >= 4 and not is_held:
            continue
        held_out += is_held
        name = f"{number}.wav"
        audio = 0.1 * random.standard_normal(24_000).astype(np.float32)
        save_audio(directory / name, audio, 24_000)
        line = dict(audio=name, text=text, voice="v", phonemes="ab", durations=[10, 20, 5, 5])
        lines.append({**line, "start": 0})
    (directory / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def run(script, speech, out, stop):
    with flagsaver.flagsaver(
        speech=[str(speech)],
        out=str(out),
        cache=str(speech.parent / "packed"),
        steps=50,
        stop=stop,
        batch_size=2,
        frames=3,
        log_every=1,
    ):
        script.main([])


def test_a_resumed_run_gives_equal_weights_to_the_bit(script, speech, tmp_path):
    run(script, speech, tmp_path / "whole", stop=4)
    for stop in (2, 4):
        run(script, speech, tmp_path / "parts", stop=stop)
    whole, parts = (
        load_file(tmp_path / name / "weights" / "000004.safetensors") for name in ("whole", "parts")
    )
    for name, weight in whole.items():
        np.testing.assert_array_equal(weight, parts[name], err_msg=name)
    lines = read_metrics(tmp_path / "parts")
    assert [line["step"] for line in lines if "mel" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out" in line] == [2, 4]


def test_resuming_a_run_with_other_settings_is_refused(script, speech, tmp_path):
    run(script, speech, tmp_path, stop=1)
    with flagsaver.flagsaver(wave_weight=0.5), pytest.raises(InputError, match="--wave_weight"):
        run(script, speech, tmp_path, stop=2)
