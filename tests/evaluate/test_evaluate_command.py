"""`python -m csm_jax.evaluate`: three phases, resumed after a kill, and what the report says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import csm_jax
from csm_jax.evaluate.__main__ import run
from csm_jax.io.audio import load_audio

RATE = 24_000
STUBS = [
    "--recognizer=stub_judges:recognize",
    "--speaker_encoder=stub_judges:embed",
    "--quality_model=stub_judges:score",
]
# Noise of 0.4 s a line, or it would not end.
NOISE = ["--checkpoint=random:tiny", "--guard=off", "--max_audio_length_ms=400", "--batch=2"]
NAME = "max_audio_length_ms=400,guard=off"
# Values that depend on the moment.
TIMES = {"first_audio_seconds", "real_time_factor", "chunks", "chunks_in_time"}
TEXTS = ["one two", "one two three", "two", "one two two three four five"]


@pytest.fixture
def prompts(tmp_path):
    """Four lines, two of them with a prompt of half a second."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(12_000)
    soundfile.write(tmp_path / "voice.wav", noise, RATE)
    lines = [f"{i}|before|voice.wav|{text}" for i, text in enumerate(TEXTS[:2])]
    lines += [f"{i}|{text}" for i, text in enumerate(TEXTS[2:], 2)]
    (tmp_path / "meta.lst").write_text("\n".join(lines))
    return tmp_path / "meta.lst"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.fixture
def spoken(prompts, tmp_path, capsys):
    """The directory of a run with judges whose opinions are known."""
    out = tmp_path / "out"
    assert run([f"--prompts={prompts}", f"--out={out}", *NOISE, *STUBS]) == 0
    return out


def test_the_report_has_the_figures_that_follow_from_the_judges(spoken, capsys):
    """ "One, two -- two" is heard in all takes."""
    (figures,) = report(spoken)["configurations"].values()
    # "one two": one word is repeated. "one two three": one is replaced. "two": two are added, one
    # of them beside its like. "one two two three four five": three are missing.
    rates = [1 / 2, 1 / 3, 2 / 1, 3 / 6]
    assert figures["takes"] == 4
    assert figures["word_error_rate_mean"] == pytest.approx(np.mean(rates))
    assert figures["word_error_rate_median"] == pytest.approx(0.5)
    assert figures["word_error_rate_p95"] == pytest.approx(np.percentile(rates, 95))
    assert figures["word_error_rate_total"] == pytest.approx((1 + 1 + 2 + 3) / 12)
    assert figures["failed_share"] == 1 / 4
    assert figures["missing_share"] == pytest.approx(3 / 12)
    assert figures["capped_share"] == 1
    assert figures["word_error_rate_ended"] is None
    assert figures["word_error_rate_cut"] == figures["word_error_rate_mean"]
    assert figures["similarity_mean"] == pytest.approx(0.6)
    assert figures["quality_mean"] == pytest.approx(0.4)
    assert 0 < figures["first_audio_median"] < 60
    assert 0 <= figures["viability"] <= 1


def test_the_report_counts_the_takes_in_which_the_guard_did_something(spoken):
    path = spoken / NAME / "takes.jsonl"
    kinds = (["resampled", "resampled"], ["continued", "ended"], ["ended"], [])
    takes = [take | {"notices": each} for take, each in zip(read(path), kinds, strict=True)]
    path.write_text("".join(json.dumps(take) + "\n" for take in takes))
    assert run([f"--out={spoken}", *NOISE[1:3], "--phases=report"]) == 0
    (figures,) = report(spoken)["configurations"].values()
    assert figures["resampled_share"] == 1 / 4
    assert figures["continued_share"] == 1 / 4
    assert figures["guard_ended_share"] == 2 / 4
    assert figures["capped_share"] == 0


def test_the_report_has_a_table_and_pictures(spoken):
    text = (spoken / "report.md").read_text()
    assert "| word error rate, all words | 0.583 |" in text
    assert "word error rate, ended takes" not in text
    assert "| 2 | 2.00 | 2 | 1 2 2 |" in text
    for name in ("words", "lengths", "times", "voices"):
        assert f"![{name}.png]({name}.png)" in text
        assert (spoken / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_take_is_a_recording_and_a_line(spoken):
    takes = read(spoken / NAME / "takes.jsonl")
    assert [take["id"] for take in takes] == ["0", "1", "2", "3"]
    for take, text in zip(takes, TEXTS, strict=True):
        audio = load_audio(spoken / NAME / "audio" / f"{take['id']}.wav", RATE)
        assert take["text"] == text
        assert (take["frames"], take["seconds"]) == (5, 0.4)
        assert len(audio) == 0.4 * RATE
        assert (take["notices"], take["ended"]) == (["cut"], False)


def test_a_take_is_what_the_model_speaks_alone(spoken):
    model = csm_jax.load("random:tiny")
    take = read(spoken / NAME / "takes.jsonl")[2]
    audio = model.generate(
        take["text"], seed=take["seed"], guard="off", max_audio_length_ms=400, notify=print
    )
    recorded = load_audio(spoken / NAME / "audio" / "2.wav", RATE)
    # Both are rounded to 16 bits; and batches of other sizes round differently.
    np.testing.assert_allclose(recorded, np.clip(audio, -1, 1), atol=1e-3)


def test_phases_can_run_one_after_the_other(prompts, spoken, tmp_path, capsys):
    out = tmp_path / "phases"
    given = [f"--prompts={prompts}", f"--out={out}", *NOISE, *STUBS]
    for phase in ("speak", "judge", "report"):
        assert run([*given, f"--phases={phase}"]) == 0
    assert words_of(out / NAME) == words_of(spoken / NAME)
    assert run([f"--out={out}", *NOISE[1:3], "--phases=report"]) == 0


def words_of(directory: Path) -> list[dict]:
    return read(directory / "words.jsonl")


def test_only_new_takes_are_judged_again(prompts, spoken, monkeypatch, capsys):
    """And all of them by another judge."""
    import stub_judges

    heard = []
    monkeypatch.setattr(stub_judges, "recognize", lambda *_: heard.append(1) or "two")
    given = [f"--prompts={prompts}", f"--out={spoken}", *NOISE]
    lines = (spoken / NAME / "words.jsonl").read_text().splitlines()
    # The last line is incomplete, as if the process had been killed then.
    (spoken / NAME / "words.jsonl").write_text("\n".join(lines)[:-20])
    assert run([*given, *STUBS]) == 0
    assert len(heard) == 1
    assert [line["heard"] for line in words_of(spoken / NAME)] == ["1 2 2"] * 3 + ["2"]
    assert run([*given, *STUBS, "--language=de"]) == 0
    assert len(heard) == 5


def test_other_flags_or_prompts_need_another_directory(prompts, spoken, capsys):
    given = [f"--prompts={prompts}", f"--out={spoken}", *NOISE, *STUBS]
    assert run([*given, "--batch=3"]) == 2
    error = capsys.readouterr().err
    assert "was begun with batch 2, not 3: use the same flags, or another --out" in error
    prompts.write_text("0|one")
    assert run(given) == 2
    assert "was begun with prompts" in capsys.readouterr().err


def test_a_line_that_fails_is_named_at_the_end_and_tried_again(prompts, tmp_path, capsys):
    lines = prompts.read_text().replace("0|before|voice.wav", "0|before|noise.wav")
    prompts.write_text(lines)
    (tmp_path / "noise.wav").write_text("this is not a recording")
    given = [f"--prompts={prompts}", f"--out={tmp_path / 'out'}", *NOISE, *STUBS]
    assert run(given) == 2
    error = capsys.readouterr().err
    assert "meta.lst, line 1: " in error
    assert "csm_jax.evaluate: error: 1 lines failed, see above" in error
    takes = read(tmp_path / "out" / NAME / "takes.jsonl")
    assert [take["id"] for take in takes] == ["1", "2", "3"]
    (tmp_path / "noise.wav").write_bytes((tmp_path / "voice.wav").read_bytes())
    assert run(given) == 0
    assert report(tmp_path / "out")["configurations"][NAME]["takes"] == 4


def test_a_report_without_takes_is_refused(tmp_path, capsys):
    assert run([f"--out={tmp_path}", "--phases=report"]) == 2
    assert "has no takes: speak them first" in capsys.readouterr().err


def test_a_grid_is_a_column_each_and_compared_with_the_first(prompts, tmp_path, capsys):
    out = tmp_path / "grid"
    given = [f"--prompts={prompts}", f"--out={out}", *NOISE, *STUBS, "--temperature=0.5,0.9"]
    assert run(given) == 0
    names = [f"{NAME},temperature={value}" for value in (0.5, 0.9)]
    assert list(report(out)["configurations"]) == names
    (comparison,) = report(out)["comparisons"]
    assert (comparison["baseline"], comparison["name"]) == tuple(names)
    assert comparison["num_takes"] == 4
    assert comparison["differences"]["word_error_rate_mean"]["p_value"] == 1
    assert f"| {names[1]} less {names[0]}, 4 takes |" in capsys.readouterr().out


def test_a_run_is_compared_with_an_earlier_one(prompts, spoken, tmp_path, capsys):
    """The takes of the same texts; a longer limit makes longer speech."""
    out = tmp_path / "later"
    longer = "--max_audio_length_ms=800"  # the last of two equal flags counts
    given = [f"--prompts={prompts}", f"--out={out}", *NOISE, *STUBS, longer]
    assert run([*given, f"--baseline={spoken / NAME}"]) == 0
    (comparison,) = report(out)["comparisons"]
    longer = comparison["differences"]["seconds_mean"]
    assert (longer["value"], longer["low"], longer["high"]) == pytest.approx((0.4, 0.4, 0.4))
    assert longer["p_value"] < 0.01


@pytest.mark.long
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_is_continued_with_the_same_files(tmp_path, kind, compiled_alike):
    prompts = tmp_path / "meta.lst"
    prompts.write_text("\n".join(f"{i:02}|one two {i}" for i in range(24)))
    given = [f"--prompts={prompts}", *NOISE, "--phases=speak"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run([*given, f"--out={whole}"]) == 0
    lines = killed / NAME / "takes.jsonl"
    command = [sys.executable, "-m", "csm_jax.evaluate", *given, f"--out={killed}"]
    with subprocess.Popen(command, env=os.environ | compiled_alike) as process:
        while not lines.is_file() or lines.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(kind)
    assert process.returncode == -kind
    num_spoken = len(read(lines))
    assert 3 <= num_spoken < 24
    with lines.open("a") as file:
        file.write('{"id": "23", "te')
    assert run([*given, f"--out={killed}"]) == 0
    assert contents(killed / NAME) == contents(whole / NAME)


def contents(directory: Path) -> dict[str, object]:
    takes = [
        {name: value for name, value in take.items() if name not in TIMES}
        for take in read(directory / "takes.jsonl")
    ]
    files = {path.name: path.read_bytes() for path in (directory / "audio").iterdir()}
    return {"takes": takes, **files}
