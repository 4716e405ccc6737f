"""What judges say of a take."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm_jax import CSMError, InputError
from csm_jax.evaluate import judges
from csm_jax.evaluate.judge import (
    QUALITY,
    judge_takes,
    quality_judge,
    read_figures,
    similarity_judge,
    word_judge,
)
from csm_jax.evaluate.takes import Take, TakeDirectory

TONE = np.full(24_000, 0.5, np.float32)
NOTHING = np.zeros(0, np.float32)


def take(prompt: str | None = None) -> Take:
    return Take("a", "One two.", 0, 0, prompt, 12, 1.0, (), True, 0.1, 0.5, 1, 1, 0)


def never(*_: object) -> None:
    raise AssertionError("there is nothing to measure")


def test_words_are_normalized_before_they_are_compared():
    judge = word_judge("test", lambda *_: "ONE, three", lambda text: text.lower().split())
    figures = judge.measure(take(), TONE)
    assert (figures["reference"], figures["heard"]) == ("one two.", "one, three")
    assert (figures["words"], figures["substitutions"]) == (2, 2)


def test_all_words_of_a_take_without_speech_are_missing():
    figures = word_judge("test", never, str.split).measure(take(), NOTHING)
    assert (figures["deletions"], figures["insertions"], figures["transcript"]) == (2, 0, "")
    assert quality_judge("test", never).measure(take(), NOTHING) == {"quality": None}
    assert similarity_judge("test", never).measure(take("gone.wav"), NOTHING) == {
        "similarity": None
    }


def test_similarity_is_the_cosine_to_the_prompt(tmp_path):
    soundfile.write(tmp_path / "prompt.wav", np.full(12_000, 0.5), 24_000)
    vectors = {12_000: np.array([2.0, 0.0]), 24_000: np.array([3.0, 4.0])}
    judge = similarity_judge("test", lambda audio, _: vectors[len(audio)])
    figures = judge.measure(take(str(tmp_path / "prompt.wav")), TONE)
    assert figures["similarity"] == pytest.approx(0.6)
    assert judge.measure(take(), TONE) == {"similarity": None}
    vectors[24_000] = np.zeros(2)
    assert judge.measure(take(str(tmp_path / "prompt.wav")), TONE) == {"similarity": None}


def spoken(path: Path, *takes: Take) -> TakeDirectory:
    directory = TakeDirectory(path)
    with directory.writing({}):
        for each in takes:
            soundfile.write(directory.recording(each.id), TONE, 24_000)
            directory.add(each)
    return directory


def test_a_take_that_another_configuration_has_too_is_measured_once(tmp_path):
    """A configuration's take is the same if its recording is."""
    first = spoken(tmp_path / "first", take(), replace(take(), id="b"))
    second = spoken(tmp_path / "second", take(), replace(take(), id="b", crc32=1))
    measured = []
    judge = quality_judge("test", lambda *_: float(len(measured.append(1) or measured)))
    for directory in (first, second):
        judge_takes(directory, directory.read(), judge, [first, second])
    assert [line["quality"] for line in read_figures(first, QUALITY).values()] == [1, 2]
    assert [line["quality"] for line in read_figures(second, QUALITY).values()] == [1, 3]
    other = replace(judge, name="other")
    judge_takes(second, second.read(), other, [first, second])
    assert [line["quality"] for line in read_figures(second, QUALITY).values()] == [4, 5]


def test_none_is_no_judge():
    assert judges.load_recognizer("none", "en") is None
    assert judges.load_speaker_encoder("none") is None
    assert judges.load_quality_model("none") is None


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faster_whisper", None)
    with pytest.raises(CSMError, match=r"faster_whisper is missing: pip install 'csm-jax\[eval"):
        judges.load_recognizer("whisper", "en")


def test_a_model_of_whisper_is_never_downloaded(tmp_path):
    pytest.importorskip("faster_whisper")
    for name in ("large-v3", str(tmp_path)):
        with pytest.raises(InputError, match=r"has no model\.bin: name the directory"):
            judges.load_recognizer(f"whisper:{name}", "en")
    with pytest.raises(InputError, match="--language is de, but whisper knows English only"):
        judges.load_recognizer("whisper", "de")
