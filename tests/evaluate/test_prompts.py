"""Files of prompts, and the grid of configurations."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from absl import flags

from csm_jax import InputError, Request
from csm_jax.evaluate import grid
from csm_jax.evaluate.__main__ import run
from csm_jax.evaluate.prompts import read_prompts


@pytest.fixture(autouse=True)
def recording(tmp_path):
    (tmp_path / "wavs").mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(12_000)
    soundfile.write(tmp_path / "wavs" / "a.wav", noise, 24_000)


def write(directory: Path, text: str, name: str = "meta.lst") -> Path:
    (directory / name).write_text(text, encoding="utf-8")
    return directory / name


@pytest.mark.parametrize("end", ["", "|wavs/a.wav"])
def test_a_line_of_seed_tts_eval_is_a_text_after_a_prompt(tmp_path, end):
    """The lines of its `meta.lst` have four columns, or five in those with a true recording."""
    text = f"common_1-common_2|The prompt's words.|wavs/a.wav|What to say.{end}\n"
    (line,) = read_prompts(write(tmp_path, text))
    assert line.name == "common_1-common_2"
    assert line.request == Request("What to say.")
    (turn,) = line.context
    assert (turn.speaker, turn.text) == (0, "The prompt's words.")
    assert turn.audio == tmp_path / "wavs" / "a.wav"


def test_two_columns_have_no_prompt(tmp_path):
    lines = read_prompts(write(tmp_path, "a|Hello.\n\nb|Bye.\n"))
    assert [(line.name, line.request.text, list(line.context)) for line in lines] == [
        ("a", "Hello.", []),
        ("b", "Bye.", []),
    ]


def test_json_lines_are_those_of_a_manifest(tmp_path):
    fields = {
        "id": "a",
        "text": "Hello.",
        "speaker": 1,
        "context": [{"speaker": 1, "text": "Before.", "audio": "wavs/a.wav"}],
    }
    (line,) = read_prompts(write(tmp_path, json.dumps(fields), "prompts.jsonl"))
    assert (line.name, line.request.speaker, line.request.text) == ("a", 1, "Hello.")
    assert line.context[0].audio == tmp_path / "wavs" / "a.wav"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no lines"),
        ("a", "line 1: 1 columns with | between, expected id|text"),
        ("a|b|c|d|e|f", "line 1: 6 columns"),
        ("a|Hello.\nb|Hello.|wavs/a.wav", "line 2: three columns: a prompt needs its transcript"),
        ("a|Before.|wavs/b.wav|Hello.", "wavs/b.wav does not exist"),
        ("a||wavs/a.wav|Hello.", "the text is empty"),
        ("a|Hello.\na|Bye.", "line 2: a is the name of"),
        ("../a|Hello.", "id is '../a', but it names a file"),
    ],
)
def test_an_invalid_file_is_one_line_and_exit_code_2(tmp_path, capsys, text, message):
    prompts, out = write(tmp_path, text), tmp_path / "out"
    with pytest.raises(InputError):
        read_prompts(prompts)
    given = [f"--prompts={prompts}", f"--out={out}", "--phases=speak", "--checkpoint=random:tiny"]
    assert run(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("csm_jax.evaluate: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


# --- Configurations -----------------------------------------------------------------------------


def configurations(*given: str) -> list[grid.Configuration]:
    values = flags.FlagValues()
    grid.define_flags(values)
    values(["evaluate", *given])
    return grid.read_configurations(values)


def test_configurations_are_all_combinations_of_the_given_values():
    found = configurations("--guard=off,on", "--temperature=0.7,0.9", "--top_k=20")
    assert [each.name for each in found] == [
        "guard=off,temperature=0.7,top_k=20",
        "guard=off,temperature=0.9,top_k=20",
        "guard=on,temperature=0.7,top_k=20",
        "guard=on,temperature=0.9,top_k=20",
    ]
    assert [each.name for each in configurations()] == ["default"]


def test_the_values_of_a_configuration_replace_those_of_a_line(tmp_path):
    fields = {"id": "a", "text": "Hello.", "guard": "on", "top_k": 10, "top_p": 0.5}
    (line,) = read_prompts(write(tmp_path, json.dumps(fields), "prompts.jsonl"))
    (configuration,) = configurations("--guard=off", "--top_k=20", "--greedy=true")
    request = configuration.request(line)
    assert (request.text, request.guard) == ("Hello.", "off")
    sampling = request.sampling
    assert (sampling.top_k, sampling.top_p, sampling.greedy) == (20, 0.5, True)


def test_seeds_differ_between_lines_and_agree_between_configurations(tmp_path):
    lines = read_prompts(write(tmp_path, "a|Hello.\nb|Hello."))
    off, on = configurations("--guard=off,on")
    other, _ = configurations("--seed=1,2")
    assert [off.request(line).seed for line in lines] == [on.request(line).seed for line in lines]
    seeds = {each.request(line).seed for each in (off, other) for line in lines}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--guard=off,perhaps", "guard=perhaps: guard is perhaps, but must be on or off"),
        ("--temperature=0", "temperature is 0"),
        ("--top_k=20,many", "--top_k is many, expected a whole number"),
        ("--greedy=yes", "--greedy is yes, expected true or false"),
        ("--seed=1,1", "--seed is 1,1: give each value once"),
        ("--best_off=1,4", "best_off"),
        ("--phases=speak,listen", "--phases has listen, but there are speak, judge, report"),
        ("--recognizer=ears", "--recognizer is ears, but must be whisper, module:function or none"),
        ("--recognizer=ears:hear", "--recognizer is ears:hear: No module named 'ears'"),
        ("--recognizer=json:hear", "module 'json' has no attribute 'hear'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(tmp_path, capsys, flag, message):
    prompts = write(tmp_path, "a|Hello.")
    given = ["--checkpoint=random:tiny", f"--prompts={prompts}", f"--out={tmp_path / 'out'}"]
    assert run([*given, flag]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["prompts", "out"])
def test_a_missing_flag_is_named(tmp_path, capsys, missing):
    given = {"prompts": write(tmp_path, "a|Hello."), "out": tmp_path / "out"}
    assert run([f"--{name}={path}" for name, path in given.items() if name != missing]) == 2
    assert f"--{missing} is missing" in capsys.readouterr().err
