"""`--words_out`: when the words of the written speech are spoken, as other programs read it."""

import json
from pathlib import Path

import numpy as np
import praatio.textgrid
import pysrt
import pytest
import soundfile
import webvtt

import csm_jax
from csm_jax.cli import flags as cli
from csm_jax.generate import run
from csm_jax.inference.alignment.words import Word

TEXT = "Four, nine one - zero."
FLAGS = ["--checkpoint=demo", "--seed=2"]


@pytest.fixture(scope="module")
def model():
    return csm_jax.load("demo")


@pytest.fixture(scope="module")
def speech(model):
    return model.speak(TEXT, seed=2)


def speak(*flags: str) -> None:
    assert run([*FLAGS, *flags]) == 0


def rows_of(words: list[Word] | tuple[Word, ...]) -> list[dict]:
    return [
        {
            "text": word.text,
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "confidence": round(word.confidence, 3),
        }
        for word in words
    ]


def assert_near(rows: list[dict], words, atol: float) -> None:
    assert [row["text"] for row in rows] == [word.text for word in words]
    for name in ("start", "end"):
        expected = [getattr(word, name) for word in words]
        np.testing.assert_allclose([row[name] for row in rows], expected, atol=atol)


# --- One text -----------------------------------------------------------------------------------


def test_words_are_those_of_speak(tmp_path, speech):
    out = tmp_path / "words.json"
    speak(f"--text={TEXT}", f"--out={tmp_path / 'speech.wav'}", f"--words_out={out}")
    assert json.loads(out.read_text()) == rows_of(speech.words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speech.wav", "words.json"]


def test_words_of_a_stream_are_those_of_the_whole(tmp_path, speech):
    """The samples of a stream differ from the others in the last bits."""
    out = tmp_path / "words.json"
    speak(f"--text={TEXT}", "--stream", f"--out={tmp_path / 'x.wav'}", f"--words_out={out}")
    assert_near(json.loads(out.read_text()), speech.words, atol=0.011)


def test_subtitles_open_with_pysrt(tmp_path, speech):
    out = tmp_path / "words.srt"
    speak(f"--text={TEXT}", f"--out={tmp_path / 'x.wav'}", f"--words_out={out}")
    (line,) = pysrt.open(str(out))
    assert line.text == " ".join(word.text for word in speech.words) == TEXT
    times = [line.start.ordinal / 1000, line.end.ordinal / 1000]
    np.testing.assert_allclose(times, [speech.words[0].start, speech.words[-1].end], atol=1e-3)


def test_captions_open_with_webvtt(tmp_path, speech):
    out = tmp_path / "words.vtt"
    speak(f"--text={TEXT}", f"--out={tmp_path / 'x.wav'}", f"--words_out={out}")
    (caption,) = webvtt.read(out)
    assert caption.text == TEXT
    times = [caption.start_in_seconds, caption.end_in_seconds]
    np.testing.assert_allclose(times, [speech.words[0].start, speech.words[-1].end], atol=1)
    assert caption.start == f"00:00:{speech.words[0].start:06.3f}"


def test_a_textgrid_opens_with_praatio(tmp_path, speech):
    out = tmp_path / "words.TextGrid"
    speak(f"--text={TEXT}", f"--out={tmp_path / 'x.wav'}", f"--words_out={out}")
    grid = praatio.textgrid.openTextgrid(str(out), includeEmptyIntervals=False)
    assert grid.maxTimestamp == pytest.approx(soundfile.info(tmp_path / "x.wav").duration, abs=1e-5)
    intervals = grid.getTier("words").entries
    assert [interval.label for interval in intervals] == [word.text for word in speech.words]
    times = [(interval.start, interval.end) for interval in intervals]
    np.testing.assert_allclose(times, [(word.start, word.end) for word in speech.words], atol=1e-5)


# --- Several turns, many texts ------------------------------------------------------------------


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_words_of_a_script_are_timed_in_the_joined_file(tmp_path, model, speech, stream):
    soundfile.write(tmp_path / "before.wav", 0.1 * np.ones(24_000), 24_000)
    script = [
        {"speaker": 0, "text": TEXT},
        {"speaker": 1, "text": "two", "audio": "before.wav"},
        {"speaker": 0, "text": "three five"},
    ]
    (tmp_path / "script.json").write_text(json.dumps(script))
    out, words_out = tmp_path / "speech.wav", tmp_path / "words.json"
    flags = [f"--script={tmp_path / 'script.json'}", f"--out={out}", f"--words_out={words_out}"]
    speak(*flags, *stream)
    before, _ = soundfile.read(tmp_path / "before.wav", dtype="float32")
    context = [
        csm_jax.Segment(0, TEXT, codes=speech.codes),
        csm_jax.Segment(1, "two", before),
    ]
    second = model.speak("three five", context=context, seed=3)
    offset = len(speech.audio) / 24_000
    expected = [*speech.words, *(word.moved(offset) for word in second.words)]
    assert_near(json.loads(words_out.read_text()), expected, atol=0.011)
    length = len(speech.audio) + len(second.audio)
    assert soundfile.info(out).frames == length


def test_every_line_of_a_manifest_has_its_words(tmp_path, model):
    lines = [{"text": "one two", "id": "a"}, {"text": "three four five", "id": "b", "seed": 7}]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    flags = [f"--manifest={tmp_path / 'lines.jsonl'}", f"--out_dir={out}", "--batch=2"]
    speak(*flags, "--words_out=.json")
    files = ["a.json", "a.wav", "b.json", "b.wav"]
    assert sorted(path.name for path in out.iterdir()) == files
    for name, text, seed in (("a", "one two", 2), ("b", "three four five", 7)):
        expected = model.speak(text, seed=seed).words
        assert_near(json.loads((out / f"{name}.json").read_text()), expected, atol=0.011)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "a.json").unlink()
    (out / "b.wav").unlink()
    speak(*flags, "--words_out=.json")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# --- What cannot be written ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words_out": "words.doc"}, "ends in none of .json, .srt, .vtt, .TextGrid"),
        ({"words_out": "missing/words.srt"}, "words.srt cannot be written"),
        ({"checkpoint": "random:tiny"}, "has no alignment.json"),
        ({"checkpoint": "random:tiny", "stream": "true"}, "has no alignment.json"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_spoken(tmp_path, capsys, change, message):
    values = {"checkpoint": "demo", "out": "x.wav", "words_out": "x.srt", "text": "one"} | change
    for name in ("out", "words_out"):
        values[name] = tmp_path / values[name]
    assert run([f"--{name}={value}" for name, value in values.items()]) == cli.USAGE_ERROR
    *warnings, error = capsys.readouterr().err.splitlines()
    assert message in error
    assert all("random" in warning for warning in warnings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words_out", "message"),
    [
        ("words.srt", "--words_out is words.srt, but with --manifest only an ending"),
        ("srt", "--words_out is srt, but with --manifest only an ending"),
        (".doc", "ends in none of .json"),
    ],
)
def test_of_a_manifest_only_an_ending_is_given(tmp_path, capsys, words_out, message):
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n')
    flags = [f"--manifest={tmp_path / 'lines.jsonl'}", f"--out_dir={tmp_path / 'out'}"]
    assert run(["--checkpoint=demo", *flags, f"--words_out={words_out}"]) == cli.USAGE_ERROR
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path(tmp_path / "out").exists()
