"""`--manifest`: a whole file for each line; the lines after a failed one are spoken."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from fixtures import CONFIG

import csm_jax
from csm_jax import InputError, Request, Sampling, Segment
from csm_jax.cli import manifest
from csm_jax.cli.manifest import read_manifest, speak_manifest
from csm_jax.generate import run
from csm_jax.io import audio

RATE = 24_000
NOISE = "random:tiny: the weights are random, the sound is noise and not speech"
DEFAULT = Request("?", 2, sampling=Sampling(0.8), max_audio_length_ms=400, seed=3, guard="off")
FLAGS = ["--checkpoint=random:tiny", "--max_audio_length_ms=400", "--guard=off"]


@pytest.fixture(scope="module")
def model():
    return csm_jax.load("random:tiny")


@pytest.fixture(autouse=True)
def recordings(tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(6 * CONFIG.codec.frame_size)
    soundfile.write(tmp_path / "voice.wav", noise, RATE)
    (tmp_path / "noise.wav").write_text("this is not a recording")


def write(directory: Path, *lines: dict | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (directory / "lines.jsonl").write_text("".join(f"{text}\n" for text in texts))
    return directory / "lines.jsonl"


def read(directory: Path, *lines: dict | str) -> list[manifest.Line]:
    return read_manifest(write(directory, *lines), DEFAULT)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- Reading ------------------------------------------------------------------------------------

HELLO = {"text": "Hello."}
TURN = {"speaker": 0, "text": "Before.", "audio": "voice.wav"}
BAD_LINES = {
    "not JSON": ("{", "not JSON"),
    "no object": ("[1]", "expected an object with text"),
    "a word": ('"Hello."', "expected an object with text"),
    "unknown field": ({"text": "a", "txet": "b"}, "unknown field txet; known are text, id"),
    "no text": ({"id": "a"}, "field text is missing"),
    "empty text": ({"text": " "}, "the text is empty"),
    "text is a number": ({"text": 5}, "text is 5"),
    "text is null": ({"text": None}, "text is None"),
    "speaker is true": ({"text": "a", "speaker": True}, "speaker is True"),
    "speaker is real": ({"text": "a", "speaker": 1.5}, "speaker is 1.5"),
    "seed is a word": ({"text": "a", "seed": "1"}, "seed is '1'"),
    "greedy is 1": ({"text": "a", "greedy": 1}, "greedy is 1"),
    "temperature is true": ({"text": "a", "temperature": True}, "temperature is True"),
    "temperature is NaN": ('{"text": "a", "temperature": NaN}', "temperature is nan"),
    "temperature is 0": ({"text": "a", "temperature": 0}, "temperature is 0"),
    "top_k is 0": ({"text": "a", "top_k": 0}, "top_k is 0"),
    "length is infinite": ('{"text": "a", "max_audio_length_ms": Infinity}', "is inf"),
    "length is a word": ({"text": "a", "max_audio_length_ms": "1 s"}, "is '1 s'"),
    "guard": ({"text": "a", "guard": "perhaps"}, "guard is perhaps, but must be on or off"),
    "id is a path": ({"text": "a", "id": "b/c"}, "id is 'b/c'"),
    "id leads out": ({"text": "a", "id": ".."}, "id is '..'"),
    "id is a Windows path": ({"text": "a", "id": "b\\c"}, "but it names a file"),
    "id is hidden": ({"text": "a", "id": ".b"}, "no leading dot"),
    "id is empty": ({"text": "a", "id": ""}, "id is ''"),
    "id is a number": ({"text": "a", "id": 5}, "id is 5"),
    "context is an object": ({"text": "a", "context": TURN}, "context is {"),
    "turn without speaker": (
        {"text": "a", "context": [TURN, {"text": "b"}]},
        "turn 2: field speaker is missing",
    ),
    "turn of a wrong field": ({"text": "a", "context": [TURN | {"seed": 1}]}, "unknown field seed"),
    "turn without its recording": (
        {"text": "a", "context": [TURN | {"audio": "gone.wav"}]},
        "gone.wav does not exist",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_an_invalid_line_is_named_before_anything_is_spoken(name, tmp_path, capsys):
    line, message = BAD_LINES[name]
    with pytest.raises(InputError) as caught:
        read(tmp_path, HELLO, "", line, HELLO)
    error = str(caught.value)
    assert error.startswith(f"{tmp_path / 'lines.jsonl'}, line 3")
    assert message in error
    flags = [f"--manifest={tmp_path / 'lines.jsonl'}", f"--out_dir={tmp_path / 'out'}"]
    assert run([*FLAGS, *flags]) == 2
    assert capsys.readouterr().err == f"csm_jax.generate: error: {' '.join(error.split())}\n"
    assert names(tmp_path / "out") == []


# Errors in one line as well, whether they show on reading or on speaking.
STRANGE_LINES = {
    "length of 400 digits": f'{{"text": "a", "max_audio_length_ms": 1{400 * "0"}}}',
    "temperature of 400 digits": f'{{"text": "a", "temperature": 1{400 * "0"}}}',
    "number of 5000 digits": f'{{"text": "a", "seed": 1{5000 * "0"}}}',
    "deep nesting": '{"text": "a", "context": ' + 100_000 * "[" + 100_000 * "]" + "}",
    "long id": {"text": "a", "id": 300 * "a"},
    "id that is no Unicode": '{"text": "a", "id": "\\ud800"}',
    "text that is no Unicode": '{"text": "\\ud800"}',
}


@pytest.mark.parametrize("name", STRANGE_LINES)
def test_a_line_of_extreme_values_is_an_error_and_no_crash(name, tmp_path, capsys):
    flags = [f"--manifest={write(tmp_path, STRANGE_LINES[name])}", f"--out_dir={tmp_path / 'out'}"]
    assert run([*FLAGS, *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line != NOISE]
    assert "line 1" in lines[0]
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("field", ["context", "id"])
def test_a_null_is_refused(tmp_path, field):
    with pytest.raises(InputError, match=f"{field} is None"):
        read(tmp_path, {"text": "a", field: None})


@pytest.mark.parametrize("ids", [("a", "a"), ("2", None)])
def test_two_lines_of_one_name_are_refused(tmp_path, ids):
    """Also if the name of one of them is its number."""
    lines = [HELLO | ({"id": name} if name else {}) for name in ids]
    with pytest.raises(InputError, match=r"line 2: \w is the name of .*line 1 too"):
        read(tmp_path, *lines)


@pytest.mark.parametrize("content", [b"", b"\n  \n", b'{"text": "\xe9"}'])
def test_a_manifest_without_lines_is_refused(tmp_path, content):
    (tmp_path / "lines.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"lines\.jsonl (has no lines|cannot be read)"):
        read_manifest(tmp_path / "lines.jsonl", DEFAULT)


@pytest.mark.parametrize("name", ["missing.jsonl", ""])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read") as caught:
        read_manifest(tmp_path / name, DEFAULT)
    assert str(tmp_path / name) in str(caught.value)


def test_the_fields_of_a_line_replace_the_defaults(tmp_path):
    sampling = {"temperature": 1, "top_k": 7, "top_p": 0.5, "min_p": 0.1, "greedy": False}
    sampling |= {"repetition_penalty": 1.2, "depth_temperature": 0.6, "depth_top_k": 3}
    values = {"speaker": 5, "seed": 8, "max_audio_length_ms": 800.5, "guard": "on"}
    full = {"text": "Full.", "id": "full", "context": [TURN]} | values | sampling
    first, second = read(tmp_path, HELLO, full)
    assert (first.name, first.request) == ("1", Request("Hello.", 2, **_rest(DEFAULT)))
    assert first.context == []
    wanted = Request("Full.", sampling=Sampling(**sampling), **values)
    assert (second.name, second.request) == ("full", wanted)
    (turn,) = second.context
    assert (turn.speaker, turn.text, turn.audio) == (0, "Before.", tmp_path / "voice.wav")
    assert second.where == f"{tmp_path / 'lines.jsonl'}, line 2"


def _rest(request: Request) -> dict:
    return {
        name: getattr(request, name)
        for name in ("sampling", "max_audio_length_ms", "seed", "guard")
    }


def test_names_sort_as_the_lines_do(tmp_path):
    lines = read(tmp_path, *[HELLO] * 12)
    assert [line.name for line in lines] == [f"{i:02}" for i in range(1, 13)]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b"])
def test_only_a_line_feed_ends_a_line(tmp_path, character):
    """JSON allows other line ends of Unicode in a string."""
    line = json.dumps({"text": f"One.{character}Two."}, ensure_ascii=False)
    (tmp_path / "lines.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8")
    lines = read_manifest(tmp_path / "lines.jsonl", DEFAULT)
    assert [line.request.text for line in lines] == [f"One.{character}Two."] * 2


# --- Speaking -----------------------------------------------------------------------------------

LINES = [
    {"text": "One.", "id": "one", "seed": 1},
    {"text": "Two.", "id": "two", "speaker": 1, "temperature": 0.5, "max_audio_length_ms": 800},
    {"text": "Three.", "context": [TURN, {"speaker": 1, "text": "Yes?"}]},
    {"text": "Four.", "greedy": True, "max_audio_length_ms": 80},
    {"text": "Five."},
]
FILES = ["3.wav", "4.wav", "5.wav", "one.wav", "two.wav"]


def assert_spoken(model, path: Path, request: Request) -> None:
    samples, rate = soundfile.read(path, dtype="float32")
    assert rate == RATE
    wanted = np.clip(model.generate(request, notify=lambda _: None), -1, 1)
    np.testing.assert_allclose(samples, wanted, atol=1 / 32_767)


def test_every_line_has_the_samples_of_generate(model, tmp_path):
    lines = read(tmp_path, *LINES)
    (tmp_path / "out").mkdir()
    files, warnings = manifest.LineFiles(tmp_path / "out", ".wav"), []
    assert speak_manifest(model, lines, files, 2, warnings.append) == []
    assert names(tmp_path / "out") == FILES
    for line in lines:
        recording = audio.load_audio(tmp_path / "voice.wav", RATE)
        context = [Segment(0, "Before.", recording), Segment(1, "Yes?")] if line.context else []
        request = csm_jax.inference.request.as_request(line.request, context=context)
        assert_spoken(model, tmp_path / "out" / f"{line.name}.wav", request)
    assert len(warnings) == len(lines)
    assert warnings[1].startswith(
        f"{tmp_path / 'lines.jsonl'}, line 2: the speech was cut at 0.8 s"
    )


def test_existing_files_are_kept(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("one.wav", "4.wav", "else.wav"):
        (out / name).write_bytes(b"kept")
        os.utime(out / name, (1000, 1000))
    flags = [*FLAGS, f"--manifest={write(tmp_path, *LINES)}", f"--out_dir={out}", "--batch=2"]
    assert run(flags) == 0
    assert names(out) == sorted([*FILES, "else.wav"])
    for name in ("one.wav", "4.wav", "else.wav"):
        assert ((out / name).read_bytes(), (out / name).stat().st_mtime) == (b"kept", 1000)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(flags) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert capsys.readouterr().err == f"{NOISE}\n"


def test_the_lines_after_a_failed_one_are_spoken(model, tmp_path, capsys):
    bad = {"text": "Bad.", "context": [TURN | {"audio": "noise.wav"}]}
    path = write(tmp_path, LINES[0], bad, LINES[3], bad, LINES[4])
    flags = [f"--manifest={path}", f"--out_dir={tmp_path / 'new' / 'out'}", "--seed=3"]
    assert run([*FLAGS, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    for number, line in ((2, lines[-3]), (4, lines[-2])):
        expected = f"{path}, line {number}: {tmp_path / 'noise.wav'}: not readable as audio"
        assert line.startswith(expected)
    assert lines[-1] == "csm_jax.generate: error: 2 of 5 lines failed, see above"
    assert names(tmp_path / "new" / "out") == ["3.wav", "5.wav", "one.wav"]
    request = Request("Five.", seed=3, max_audio_length_ms=400, guard="off")
    assert_spoken(model, tmp_path / "new" / "out" / "5.wav", request)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "Short.", "max_audio_length_ms": 10}, "max_audio_length_ms is 10, but one frame"),
        ({"text": 300 * "\U00012000"}, "the text takes 1205 positions of 1024"),
    ],
    ids=["less than a frame", "more than the window"],
)
def test_a_line_beyond_the_model_is_refused_before_any_is_spoken(line, message, tmp_path, capsys):
    path, out = write(tmp_path, HELLO, line), tmp_path / "out"
    assert run([*FLAGS, f"--manifest={path}", f"--out_dir={out}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == NOISE
    assert lines[1].startswith(f"csm_jax.generate: error: {path}, line 2: {message}")
    assert names(out) == []


@pytest.mark.parametrize("audio_format", ["flac", "pcm"])
def test_format_is_that_of_the_files(tmp_path, audio_format):
    flags = [f"--manifest={write(tmp_path, HELLO)}", f"--out_dir={tmp_path / 'out'}"]
    assert run([*FLAGS, *flags, f"--format={audio_format}"]) == 0
    assert names(tmp_path / "out") == [f"1.{audio_format}"]
    samples = audio.load_audio(tmp_path / "out" / f"1.{audio_format}", RATE)
    assert len(samples) == 5 * CONFIG.codec.frame_size


BAD_FLAGS = {
    "text": (["--text=Hi."], "--text and --manifest do not go together"),
    "script": (["--script=a.json"], "--script and --manifest do not go together"),
    "out": (["--out=a.wav"], "--out and --manifest do not go together"),
    "codes": (["--codes_out=a.npy"], "--codes_out and --manifest do not go together"),
    "stream": (["--stream"], "--manifest takes neither --stream nor"),
    "context": (["--context_audio=a.wav"], "--manifest takes neither --stream nor"),
    "format": (["--format=txt"], "unknown audio format '.txt'"),
    "out_dir is a file": (
        ["--out_dir={0}/voice.wav"],
        "voice.wav cannot be written to (File exists)",
    ),
    "process": (["--process_id=2", "--num_processes=2"], "--process_id is 2, but must be under"),
    "coordinator without port": (["--coordinator=localhost"], "but must be host:port, or auto"),
    "coordinator of a strange port": (["--coordinator=localhost:x"], "must be host:port, or auto"),
    "no batch": (["--batch=0"], "--batch=0"),
    "address": (["--coordinator=localhost"], "--coordinator is localhost, but must be host:port"),
    "no port": (["--coordinator=localhost:http"], "but must be host:port, or auto"),
    "no host": (["--coordinator=:7000"], "but must be host:port, or auto"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_flags_that_do_not_go_with_a_manifest_are_refused(name, tmp_path, capsys):
    flags, message = BAD_FLAGS[name]
    path = write(tmp_path, HELLO)
    flags = [flag.format(tmp_path) for flag in flags]
    assert run([*FLAGS, f"--manifest={path}", f"--out_dir={tmp_path / 'out'}", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.rglob("1.*"))


def test_out_dir_is_required(tmp_path, capsys):
    assert run([*FLAGS, f"--manifest={write(tmp_path, HELLO)}"]) == 2
    assert "--out_dir is missing" in capsys.readouterr().err


# --- Several processes --------------------------------------------------------------------------


def test_two_processes_with_a_coordinator_share_the_lines(tmp_path, compiled_alike):
    path = write(tmp_path, *LINES)
    assert run([*FLAGS, f"--manifest={path}", f"--out_dir={tmp_path / 'one'}"]) == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [*FLAGS, f"--manifest={path}", f"--out_dir={tmp_path / 'two'}", "--num_processes=2"]
    flags.append(f"--coordinator=localhost:{port}")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "csm_jax.generate", *flags, f"--process_id={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | compiled_alike,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert names(tmp_path / "two") == names(tmp_path / "one") == FILES
    for name in FILES:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    numbers = [
        sorted(line.split(":")[0][-1] for line in err.splitlines()[1:]) for _, err in outputs
    ]
    assert numbers == [["1", "3", "5"], ["2", "4"]]


def test_a_finished_process_waits_for_the_others(tmp_path, monkeypatch):
    """By default jax aborts all of them after five minutes."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **named: calls.append(named))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1.wav").touch()
    flags = [*FLAGS, f"--manifest={write(tmp_path, HELLO)}", f"--out_dir={tmp_path / 'out'}"]
    assert run([*flags, "--coordinator=localhost:7000", "--num_processes=3"]) == 0
    assert run([*flags, "--coordinator=auto"]) == 0
    assert all(named.pop("shutdown_timeout_seconds") > 24 * 3600 for named in calls)
    address = {"coordinator_address": "localhost:7000", "num_processes": 3, "process_id": 0}
    assert calls == [address, {}]


def test_processes_share_the_lines_without_a_coordinator(tmp_path):
    flags = [*FLAGS, f"--manifest={write(tmp_path, *LINES)}", f"--out_dir={tmp_path / 'out'}"]
    assert run([*flags, "--num_processes=2", "--process_id=1"]) == 0
    assert names(tmp_path / "out") == ["4.wav", "two.wav"]


def test_texts_are_normalized_if_it_is_asked_for(tmp_path):
    pytest.importorskip("num2words")
    path = write(tmp_path, {"text": "**5** cats 🐈"}, {"text": "Hi.", "context": [TURN]})
    texts = [line.request.text for line in read_manifest(path, DEFAULT, normalize=True)]
    assert texts == ["five cats", "Hi."]
    assert read_manifest(path, DEFAULT)[0].request.text == "**5** cats 🐈"
    with pytest.raises(InputError, match="line 1: the text is empty"):
        read_manifest(write(tmp_path, {"text": "🐈"}), DEFAULT, normalize=True)
