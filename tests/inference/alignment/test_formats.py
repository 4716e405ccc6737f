"""Word times as files, as their own libraries read them."""

import itertools
import json
import re

import pytest

from csm_jax import InputError
from csm_jax.inference.alignment.formats import write_words
from csm_jax.inference.alignment.words import Word

WORDS = [
    Word("One,", 0.25, 0.5, 0.9),
    Word('"two"', 0.5, 1.125, 0.75),
    Word("missing", 1.125, 1.125, 0.0, spoken=False),
    Word("A&B.", 1.25, 2.0, 1.0),
    Word("Next", 61.5, 62.0, 0.5),
]
SECONDS = 63.0


def test_json_is_a_list_of_words(tmp_path):
    write_words(tmp_path / "words.json", WORDS, SECONDS)
    rows = json.loads((tmp_path / "words.json").read_text())
    assert [row["text"] for row in rows] == [word.text for word in WORDS]
    assert rows[0] == {"text": "One,", "start": 0.25, "end": 0.5, "confidence": 0.9}
    assert rows[2]["confidence"] == 0


@pytest.mark.parametrize(("name", "point"), [("x.srt", ","), ("x.vtt", ".")])
def test_subtitles_end_at_sentences_and_pauses(tmp_path, name, point):
    write_words(tmp_path / name, WORDS, SECONDS)
    text = (tmp_path / name).read_text()
    times = re.findall(r"([\d:.,]+) --> ([\d:.,]+)", text)
    assert times == [
        (f"00:00:00{point}250", f"00:00:02{point}000"),
        (f"00:01:01{point}500", f"00:01:02{point}000"),
    ]
    assert "missing" not in text
    assert text.startswith("WEBVTT\n\n" if name.endswith("vtt") else "1\n")


def test_a_webvtt_cue_times_its_words_and_escapes_markup(tmp_path):
    write_words(tmp_path / "x.vtt", WORDS, SECONDS)
    cue = 'One, <00:00:00.500>"two" <00:00:01.250>A&amp;B.'
    assert cue in (tmp_path / "x.vtt").read_text()


def test_intervals_of_a_textgrid_fill_the_speech(tmp_path):
    write_words(tmp_path / "x.TextGrid", WORDS, SECONDS)
    text = (tmp_path / "x.TextGrid").read_text()
    found = re.findall(r"xmin = ([\d.]+)\n\s+xmax = ([\d.]+)\n\s+text = \"(.*)\"", text)
    assert [row[2] for row in found] == ["", "One,", '""two""', "", "A&B.", "", "Next", ""]
    edges = [(float(start), float(end)) for start, end, _ in found]
    assert edges[0][0] == 0
    assert edges[-1][1] == SECONDS
    assert all(before[1] == after[0] for before, after in itertools.pairwise(edges))


def test_another_ending_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"none of .json, .srt, .vtt, .TextGrid"):
        write_words(tmp_path / "x.txt", WORDS, SECONDS)
    assert not list(tmp_path.iterdir())
