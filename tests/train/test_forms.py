"""Training data in the forms that people keep them in: the same turns, whatever form has them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fixtures import CONFIG

from csm_jax.checkpoints.random_weights import random_params
from csm_jax.errors import InputError
from csm_jax.mimi.codec import Codec
from csm_jax.train.codes import Clip, CodeCache
from csm_jax.train.data import read_conversations

RATE = 24_000
FRAME = CONFIG.codec.frame_size
# File, speaker and text; a text with everything that separates values elsewhere.
TURNS = [
    ("a.wav", 0, "One, two; three."),
    ("b.wav", 1, 'He said "yes".'),
    ("c.wav", 0, "Drei \u2028 ä"),
]


@pytest.fixture(autouse=True)
def recordings(tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal((3, 4 * FRAME))
    for (name, _, _), samples in zip(TURNS, noise, strict=True):
        soundfile.write(tmp_path / name, samples, RATE)


def read(path: Path) -> tuple[list[tuple[str, int, str]], list[str]]:
    """The turns as in `TURNS`, each a conversation of its own, and what the user is told."""
    told: list[str] = []
    conversations, problems = read_conversations(path, told.append)
    assert problems == []
    turns = [turn for (turn,) in (conversation.turns for conversation in conversations)]
    return [(str(t.audio.relative_to(path.parent)), t.speaker, t.text) for t in turns], told


def write_csv(path: Path, header: list[str], rows, **options) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize(
    "header",
    [
        ("audio", "speaker", "text"),
        ("file_name", "speaker_id", "transcription"),
        ("path", "client_id", "sentence"),
        ("File", "Speaker", "Text"),
        ("audio_filepath", "source", "transcript"),
    ],
)
def test_a_csv_file_with_a_header_is_read(tmp_path, header, delimiter):
    path = write_csv(tmp_path / "data.csv", header, TURNS, delimiter=delimiter)
    turns, (told,) = read(path)
    assert turns == TURNS
    assert told.startswith(f"data {path}: CSV with a header, a turn each, with {header[0]}")


def test_columns_that_are_not_read_are_named(tmp_path):
    header = ["text", "audio", "gender", "age"]
    rows = [(text, name, "", "7") for name, _, text in TURNS]
    turns, (told,) = read(write_csv(tmp_path / "data.csv", header, rows))
    assert turns == [(name, 0, text) for name, _, text in TURNS]
    assert told.endswith("with audio, text; not read: gender, age") or "not read: age" in told


@pytest.mark.parametrize("separate", ["lines", "document", "pretty"])
@pytest.mark.parametrize(
    ("audio", "speaker", "text"),
    [("audio", "speaker_id", "text"), ("path", "speaker", "text"), ("file", "source", "sentence")],
)
def test_json_objects_are_read(tmp_path, separate, audio, speaker, text):
    rows = [{text: words, audio: name, speaker: number} for name, number, words in TURNS]
    path = tmp_path / "data.json"
    if separate == "lines":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=2 if separate == "pretty" else None))
    assert read(path)[0] == TURNS


def test_the_hub_s_column_of_recordings_is_read(tmp_path):
    rows = [{"audio": {"path": n, "bytes": None}, "text": t, "speaker_id": s} for n, s, t in TURNS]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert read(tmp_path / "data.jsonl")[0] == TURNS


def test_lines_of_file_and_text_are_read(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{name}|{text}\n" for name, _, text in TURNS))
    turns, (told,) = read(tmp_path / "list.txt")
    assert turns == [(name, 0, text) for name, _, text in TURNS]
    assert "lines of file|text" in told


def test_lines_of_file_speaker_and_text_are_read(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{n}|{s}|{t}\n" for n, s, t in TURNS))
    assert read(tmp_path / "list.txt")[0] == TURNS


def test_the_files_of_ljspeech_are_read(tmp_path):
    """Names without suffix in `wavs`; the last column has numbers as words."""
    (tmp_path / "wavs").mkdir()
    for name, _, _ in TURNS:
        (tmp_path / name).rename(tmp_path / "wavs" / name)
    lines = [f"{name.removesuffix('.wav')}|in 1950|{text}\n" for name, _, text in TURNS]
    (tmp_path / "metadata.csv").write_text("".join(lines))
    wanted = [(f"wavs/{name}", 0, text) for name, _, text in TURNS]
    assert read(tmp_path / "metadata.csv")[0] == wanted
    conversations, _ = read_conversations(tmp_path)
    assert [each.turns[0].text for each in conversations] == [text for *_, text in TURNS]


def test_pairs_of_files_are_read(tmp_path):
    for name, _, text in TURNS:
        (tmp_path / name).with_suffix(".txt").write_bytes(f"\ufeff{text}\n".encode())
    told: list[str] = []
    conversations, problems = read_conversations(tmp_path, told.append)
    assert problems == []
    found = [(each.turns[0].audio.name, each.turns[0].text) for each in conversations]
    assert found == [(name, text) for name, _, text in TURNS]
    assert "pairs of a recording and a .txt" in told[0]


def test_a_recording_without_its_transcript_is_a_problem(tmp_path):
    (tmp_path / "a.txt").write_text("One.")
    conversations, problems = read_conversations(tmp_path)
    assert len(conversations) == 1
    assert [problem.line for problem in problems] == [2, 3]
    assert all(".txt cannot be read: No such file" in problem.message for problem in problems)


def test_speakers_with_names_are_numbered_in_their_order(tmp_path):
    rows = [("a.wav", "zoë", "a"), ("b.wav", "anna", "b"), ("c.wav", "zoë", "c")]
    path = write_csv(tmp_path / "data.csv", ["audio", "speaker", "text"], rows)
    turns, (told,) = read(path)
    assert [speaker for _, speaker, _ in turns] == [0, 1, 0]
    assert told.endswith("speakers: zoë is 0, anna is 1")


def test_conversations_are_read_without_a_word(tmp_path):
    lines = [[{"speaker": s, "text": t, "audio": n}] for n, s, t in TURNS]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read(tmp_path / "a.jsonl") == (TURNS, [])


def test_lines_of_both_kinds_may_be_mixed(tmp_path):
    lines = [{"speaker": s, "text": t, "audio": n} for n, s, t in TURNS]
    text = "".join(f"{json.dumps(each)}\n" for each in [[lines[0]], *lines[1:]])
    (tmp_path / "a.jsonl").write_text(text)
    assert read(tmp_path / "a.jsonl")[0] == TURNS


# --- Parts of recordings --------------------------------------------------------------------------


def test_the_codes_of_a_part_are_those_of_its_samples(tmp_path):
    """Two parts of one file, and the whole file, have codes of their own."""
    row = {"text": "a", "path": "a.wav", "speaker": 0}
    rows = [row | {"start": 0.08, "end": 0.24}, row | {"start": 0.16}, row]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    conversations, _ = read_conversations(tmp_path / "a.jsonl")
    codec = Codec(CONFIG.codec, random_params(CONFIG)["codec"])
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    wanted = [samples[1_920:5_760], samples[3_840:], samples]
    for _ in range(2):  # computed, then cached
        cache = CodeCache(tmp_path / "cache", codec, CONFIG.num_codebooks)
        sources = [each.turns[0].source for each in conversations]
        found = cache.codes(sources)
        for source, part in zip(sources, wanted, strict=True):
            np.testing.assert_array_equal(found[source], codec.encode(part, CONFIG.num_codebooks))


def test_a_part_behind_the_end_is_a_problem_that_names_it(tmp_path):
    codec = Codec(CONFIG.codec, random_params(CONFIG)["codec"])
    clip = Clip(tmp_path / "a.wav", 9.0, None)
    error = CodeCache(tmp_path / "cache", codec, 2).codes([clip])[clip]
    assert isinstance(error, InputError)
    assert str(error) == f"{tmp_path}/a.wav, 9 s to its end: the recording lasts 0.32 s"


def test_an_offset_and_a_duration_are_a_part(tmp_path):
    """As in manifests of NeMo, where the duration alone is that of the whole recording."""
    row = {"audio_filepath": "a.wav", "text": "a", "duration": 0.08}
    for offset, part in ((0.16, (0.16, 0.24)), (None, (None, None))):
        values = row if offset is None else row | {"offset": offset}
        (tmp_path / "a.jsonl").write_text(json.dumps(values))
        (conversation,), problems = read_conversations(tmp_path / "a.jsonl")
        assert problems == []
        found = conversation.turns[0].start, conversation.turns[0].end
        assert found == pytest.approx(part) if offset else found == part


@pytest.mark.parametrize("name", ["start_ms", "segment_start", "end_sec", "begin", "Onset"])
def test_parts_in_other_units_are_not_trained_on_as_a_whole(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "a", name: 80}))
    with pytest.raises(InputError, match=f"column {name} is not read, .* give start and end"):
        read_conversations(tmp_path / "a.jsonl")


BAD = [
    ({"text": "a", "path": "a.wav", "start": 2, "end": 1}, "it ends at 1 s"),
    ({"text": "a", "path": "a.wav", "start": "x"}, "start is 'x'"),
    ({"text": "a", "path": "a.wav", "end": -1}, "end is -1"),
    ({"text": "a"}, "field audio is missing"),
    ({"path": "a.wav"}, "field text is missing"),
    ({"text": " ", "path": "a.wav"}, "the text is empty"),
    ({"text": "a", "path": "a.wav", "speaker": True}, "speaker is True"),
    ({"text": "a", "path": "a.wav", "speaker": [1]}, "speaker is [1]"),
    ({"text": 5, "path": "a.wav"}, "text is 5"),
]


def test_rows_with_a_problem_are_named_by_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row, _ in BAD))
    conversations, problems = read_conversations(tmp_path / "a.jsonl")
    assert conversations == []
    assert [problem.line for problem in problems] == [*range(1, len(BAD) + 1)]
    for problem, (_, message) in zip(problems, BAD, strict=True):
        assert message in problem.message


def test_an_empty_directory_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has neither metadata"):
        read_conversations(tmp_path / "empty")


def test_a_bar_too_many_is_a_problem_of_its_line(tmp_path):
    (tmp_path / "list.txt").write_text("a.wav|One.\nb.wav|Two.|3|4\n")
    conversations, (problem,) = read_conversations(tmp_path / "list.txt")
    assert len(conversations) == 1
    assert problem.line == 2


def test_a_text_with_commas_without_quotes_is_a_problem_of_its_line(tmp_path):
    """Python's `csv` would leave out what is behind the comma."""
    (tmp_path / "a.csv").write_text("audio,text\na.wav,One, two.\nb.wav,Two.\n")
    conversations, (problem,) = read_conversations(tmp_path / "a.csv")
    assert [each.turns[0].text for each in conversations] == ["Two."]
    assert (problem.line, "put quotes around" in problem.message) == (2, True)


@pytest.mark.parametrize("separator", ["|", "\t"])
def test_lines_of_file_speaker_name_and_text_are_read(tmp_path, separator):
    lines = [separator.join((n, f"person_{s}", t)) + "\n" for n, s, t in TURNS]
    (tmp_path / "list.txt").write_text("".join(lines))
    turns, (told,) = read(tmp_path / "list.txt")
    assert turns == TURNS
    assert told.endswith("speakers: person_0 is 0, person_1 is 1")


def test_lines_with_tabs_are_read(tmp_path):
    (tmp_path / "list.tsv").write_text("".join(f"{n}\t{t}\n" for n, _, t in TURNS))
    assert read(tmp_path / "list.tsv")[0] == [(name, 0, text) for name, _, text in TURNS]


def test_a_header_of_bars_is_no_turn(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["path", "speaker", "text"], TURNS, delimiter="|")
    assert read(path)[0] == TURNS


def test_line_ends_of_old_spreadsheets_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"audio,text\ra.wav,One.\rb.wav,Two.\r")
    assert read(tmp_path / "a.csv")[0] == [("a.wav", 0, "One."), ("b.wav", 0, "Two.")]


@pytest.mark.parametrize("suffix", [".lab", ".normalized.txt"])
def test_transcripts_of_aligners_and_libritts_are_read(tmp_path, suffix):
    for name, _, text in TURNS:
        (tmp_path / name).with_suffix(suffix).write_text(text)
    conversations, problems = read_conversations(tmp_path)
    assert problems == []
    assert [each.turns[0].text for each in conversations] == [text for *_, text in TURNS]


def test_a_directory_of_directories_names_those_with_data(tmp_path):
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "train" / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(InputError, match=r"nor recordings: name .*set/train$"):
        read_conversations(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a.wav,One.\n", "first line is neither JSON, nor the header of a CSV file"),
        ("wav.scp", b"utt1 a.wav\n", "nor file|text"),
        ("a.parquet", b"PAR1\0", ".parquet is not read; write its rows as JSON lines or CSV"),
        ("a.xlsx", b"PK\3\4\0", ".xlsx is not read"),
    ],
)
def test_other_forms_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_conversations(tmp_path / name)
    assert message in str(caught.value)
