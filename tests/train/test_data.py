"""Conversations from a manifest: the frames that count in the loss, and all problems at once."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fixtures import CONFIG, TOKENIZER

from csm_jax.checkpoints.random_weights import random_params
from csm_jax.errors import InputError
from csm_jax.mimi.codec import Codec
from csm_jax.train.codes import CodeCache
from csm_jax.train.data import Problem, read_conversations, report
from csm_jax.train.examples import Example, Selection, make_examples

FRAME = CONFIG.codec.frame_size
Q = CONFIG.num_codebooks
TURN = {"speaker": 0, "text": "Hi.", "audio": "voice.wav"}


@pytest.fixture(scope="module")
def codec():
    return Codec(CONFIG.codec, random_params(CONFIG)["codec"])


@pytest.fixture(autouse=True)
def recordings(tmp_path):
    """voice.wav has 3 frames, reply.wav 5."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(5 * FRAME)
    soundfile.write(tmp_path / "voice.wav", noise[: 3 * FRAME], 24_000)
    soundfile.write(tmp_path / "reply.wav", noise, 24_000)


def write(directory: Path, *lines: object) -> Path:
    """Writes each line unchanged or as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (directory / "data.jsonl").write_text("".join(f"{text}\n" for text in texts))
    return directory / "data.jsonl"


def read(
    codec: Codec, path: Path, selection: Selection | None = None
) -> tuple[list[Example], list[Problem]]:
    """The examples and problems of a manifest."""
    conversations, problems = read_conversations(path)
    cache = CodeCache(path.parent / "cache", codec, Q)
    codes = cache.codes([turn.audio for each in conversations for turn in each.turns])
    made, more = make_examples(conversations, codes, CONFIG, TOKENIZER, selection or Selection())
    return made, problems + more


# --- Problems -------------------------------------------------------------------------------------

# The lines of one file and the problem of each, or None.
LINES = [
    ([TURN], None),
    ("  ", None),
    ("[{", "not JSON"),
    (5, "not a list of turns"),
    ([], "not a list of turns"),
    ([5], "turn 1: expected an object with speaker and text"),
    ([TURN, TURN | {"txet": "b"}], "turn 2: unknown field txet"),
    ([{"text": "b", "audio": "voice.wav"}], "turn 1: field speaker is missing"),
    ([TURN | {"speaker": True}], "turn 1: speaker is True, expected int"),
    ([{"speaker": 0, "audio": "voice.wav"}], "turn 1: field text is missing"),
    ([TURN, TURN | {"text": " "}], "turn 2: the text is empty, so the recording has no transcript"),
    ([TURN | {"text": "\ud800"}], "text has an invalid character"),
    ([{"speaker": 0, "text": "b"}], "turn 1: field audio is missing"),
    ([TURN | {"train": 1}], "turn 1: train is 1, expected true or false"),
    ([TURN, TURN | {"audio": "gone.wav"}], "turn 2: {}/gone.wav: cannot be read (No such file"),
    ([TURN | {"audio": "note.txt"}], "turn 1: {}/note.txt: not readable as audio"),
    ([TURN | {"audio": "empty.wav"}], "turn 1: {}/empty.wav: no samples"),
    ([TURN | {"audio": "nan.wav"}], "turn 1: {}/nan.wav: 1 of 1920 samples are NaN or infinite"),
    ([TURN, TURN | {"audio": "silent.wav"}], "turn 2: {}/silent.wav: silent, its peak of 0.0e+00"),
    # BOS, "[0]", 55 letters, EOS, 3 frames and the end of speech.
    ([TURN | {"text": 55 * "a"}], "64 positions of text and audio, but at most 63 fit"),
    ([TURN | {"train": False}], "nothing in it to train on"),
    ("[" * 100_000, "not JSON"),
    ([TURN | {"text": 54 * "a"}], None),
]


def test_every_line_with_a_problem_is_named(codec, tmp_path):
    """One pass finds problems of text, files, audio and lengths; the other lines are used."""
    (tmp_path / "note.txt").write_text("this is not a recording")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 24_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(FRAME), 24_000)
    broken = np.ones(FRAME, np.float32)
    broken[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, 24_000, subtype="FLOAT")
    path = write(tmp_path, *(line for line, _ in LINES))
    made, problems = read(codec, path, Selection(max_len=63))
    messages = {problem.line: problem.message for problem in problems}
    wanted = {number: says for number, (_, says) in enumerate(LINES, 1) if says}
    assert len(problems) == len(messages)
    assert messages.keys() == wanted.keys()
    for number, says in wanted.items():
        assert says.format(tmp_path) in messages[number]
        assert "\n" not in messages[number]
    assert [len(example.frames) for example in made] == [12, 63]


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"[\xff]"])
def test_a_manifest_without_lines_is_refused(content, tmp_path):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"data\.jsonl (is empty|cannot be read)"):
        read_conversations(path)


@pytest.mark.parametrize(("level", "is_speech"), [(32, False), (33, True), (-33, True)])
def test_a_peak_under_a_thousandth_is_silence(codec, level, is_speech, tmp_path):
    """A thousandth of full scale is 32.768 in 16 bits; negative peaks count too."""
    samples = np.zeros(FRAME, np.int16)
    samples[100] = level
    soundfile.write(tmp_path / "voice.wav", samples, 24_000)
    made, problems = read(codec, write(tmp_path, [TURN]))
    assert (len(made), len(problems)) == ((1, 0) if is_speech else (0, 1))
    if not is_speech:
        assert problems[0].message.endswith("silent, its peak of 9.8e-04 is under 1e-03")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line(character, tmp_path):
    """JSON allows other line ends of Unicode in a string."""
    line = json.dumps([TURN | {"text": f"One.{character}Two."}], ensure_ascii=False)
    (tmp_path / "data.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8")
    found, problems = read_conversations(tmp_path / "data.jsonl")
    assert problems == []
    assert [each.turns[0].text for each in found] == [f"One.{character}Two."] * 2
    assert [each.line for each in found] == [1, 2]


PROBLEMS = [Problem(12, "b is bad"), Problem(3, "a is bad")]
BOTH = "data.jsonl, line 3: a is bad\ndata.jsonl, line 12: b is bad\n"


def print_error(message: str) -> None:
    print(message, file=sys.stderr)


def test_problems_are_reported_in_the_order_of_the_lines(capsys):
    with pytest.raises(InputError, match="2 of 7 conversations") as caught:
        report(Path("data.jsonl"), PROBLEMS, 5, "fail", print_error)
    assert capsys.readouterr().err == BOTH
    assert str(caught.value).endswith("leave them out with --on_bad_data=skip")


def test_lines_with_problems_may_be_left_out(capsys):
    report(Path("data.jsonl"), PROBLEMS, 5, "skip", print_error)
    assert capsys.readouterr().err == BOTH


@pytest.mark.parametrize("on_bad", ["fail", "skip"])
def test_without_problems_nothing_is_reported(on_bad, capsys):
    report(Path("data.jsonl"), [], 1, on_bad, print_error)
    assert capsys.readouterr().err == ""


def test_it_is_an_error_if_no_conversation_is_left(capsys):
    with pytest.raises(InputError, match="no conversation to train on"):
        report(Path("data.jsonl"), PROBLEMS, 0, "skip", print_error)
    assert capsys.readouterr().err == BOTH


# --- Examples -----------------------------------------------------------------------------------


def test_an_example_has_the_rows_of_the_reference(codec, tmp_path):
    """The rows equal those of generator.py of SesameAILabs/csm."""
    turns = [TURN | {"train": False}, {"speaker": 12, "text": "Yes", "audio": "reply.wav"}]
    ((example,), problems) = read(codec, write(tmp_path, turns))
    assert problems == []
    text = [TOKENIZER.encode("[0]Hi."), TOKENIZER.encode("[12]Yes")]
    codes = []
    for name in ("voice.wav", "reply.wav"):
        samples, _ = soundfile.read(tmp_path / name, dtype="float32")
        codes.append(codec.encode(samples, Q))
    rows = []
    for turn_ids, turn_codes in zip(text, codes, strict=True):
        rows += [[0] * Q + [number] for number in turn_ids]
        rows += [[*frame, 0] for frame in turn_codes.tolist()]
        rows.append([0] * (Q + 1))
    np.testing.assert_array_equal(example.frames, rows)
    is_text = 8 * [True] + 4 * [False] + 9 * [True] + 6 * [False]
    np.testing.assert_array_equal(example.mask[:, -1], is_text)
    np.testing.assert_array_equal(
        example.mask[:, :-1], ~np.array(is_text)[:, None] & np.ones(Q, bool)
    )
    np.testing.assert_array_equal(example.loss_mask, 21 * [False] + 6 * [True])
    assert (example.frames.dtype, example.mask.dtype, example.loss_mask.dtype) == (
        np.int32,
        bool,
        bool,
    )
    turns = [(segment.speaker, segment.text) for segment in example.segments]
    assert turns == [(0, "Hi."), (12, "Yes")]


# Of turns of the speakers 0, 1, 0, 1, of which the third is only context, those in the loss.
SELECTIONS = {
    "all": (Selection(), [0, 1, 3]),
    "one speaker": (Selection(speakers=[0]), [0]),
    "both speakers": (Selection(speakers=[1, 0, 5]), [0, 1, 3]),
    "the last": (Selection(turns="last"), [3]),
    "the last of a speaker": (Selection(speakers=[1], turns="last"), [3]),
    "no speaker": (Selection(speakers=[]), None),
    "another's last": (Selection(speakers=[0], turns="last"), None),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_selected_turns_count_in_the_loss(codec, name, tmp_path):
    selection, trained = SELECTIONS[name]
    turns = [TURN | {"speaker": i % 2, "train": i != 2} for i in range(4)]
    made, problems = read(codec, write(tmp_path, turns), selection)
    if trained is None:
        assert made == []
        (problem,) = problems
        assert problem.line == 1
        assert "nothing in it to train on" in problem.message
        return
    assert problems == []
    # BOS, "[0]Hi.", EOS; 3 frames and the end of speech.
    wanted = [value for i in range(4) for value in 8 * [False] + 4 * [i in trained]]
    np.testing.assert_array_equal(made[0].loss_mask, wanted)


def test_a_last_turn_that_is_only_context_does_not_count(codec, tmp_path):
    path = write(tmp_path, [TURN, TURN | {"train": False}])
    assert read(codec, path, Selection(turns="last"))[0] == []


def test_paths_of_recordings_are_relative_to_the_file(codec, tmp_path, monkeypatch):
    """Not to the working directory."""
    (tmp_path / "elsewhere").mkdir()
    path = write(tmp_path, [TURN])
    monkeypatch.chdir(tmp_path / "elsewhere")
    made, problems = read(codec, path)
    assert (len(made), problems) == (1, [])


def test_all_problems_of_a_line_are_reported(codec, tmp_path):
    missing = [{**TURN, "audio": name} for name in ("one.wav", "two.wav")]
    unspoken = [{**TURN, "text": ""}, TURN, {**TURN, "loud": 1}]
    _, problems = read(codec, write(tmp_path, [*missing, TURN], unspoken))
    of_line = {problem.line: problem.message for problem in problems}
    assert re.search(r"turn 1: .*one\.wav.*; turn 2: .*two\.wav", of_line[1])
    assert re.search(r"turn 1: the text is empty.*; turn 3: unknown field loud", of_line[2])
