"""Word times of the open-vocabulary voice's recordings, from durations of a small manifest."""

import json
from pathlib import Path

import jax
import pytest
from conversations import write_conversations
from plan import MAIN_VOICES
from sizes import VOICE_MODEL
from speech_set import read_manifests
from spoken_words import align, word_times, written_words

from csm_jax.checkpoints import native_format
from csm_jax.train.data import read_conversations

# Phonemes of words alone; espeak-ng joins some of them in a sentence, and changes sounds.
ALONE = {"For": "fˈoːɹ", "the": "ðˈə", "cat,": "kˈæt,", "five": "fˈIv", "thirty.": "θˈɜɹɾi."}
ALONE |= {"A": "ˈA", "dog.": "dˈɔːɡ."}


def line(text: str, phonemes: str, units: dict[int, int], **more) -> dict:
    """A line of a manifest: every symbol takes one unit of 25 ms, but for `units`."""
    durations = [units.get(i, 1) for i in range(-1, len(phonemes) + 1)]
    fields = {"text": text, "voice": MAIN_VOICES[0], "phonemes": phonemes, "durations": durations}
    return fields | {"audio": f"{MAIN_VOICES[0]}/{abs(hash(text))}.ogg", "start": 0} | more


def read(directory: Path, *lines: dict):
    (directory / "manifest.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return read_manifests([directory])


def times(utterance) -> list[tuple] | None:
    words = word_times(utterance, ALONE.__getitem__)
    return None if words is None else [tuple(word.values()) for word in words]


def test_words_are_timed_where_one_word_of_phonemes_is_two_words_of_text(tmp_path):
    """fəɹðə is "For the": symbols 0 to 4; a stress mark and a length mark belong to a sound."""
    (utterance,) = read(tmp_path, line("For the cat,", "fəɹðə kˈæːt,", {-1: 4, 7: 3}))
    assert times(utterance) == [
        ("For", 0.1, 0.175),
        ("the", 0.175, 0.225),
        ("cat,", 0.25, 0.425),
    ]


def test_a_trimmed_beginning_shifts_the_words(tmp_path):
    (utterance,) = read(tmp_path, line("A cat,", "ɐ kˈæt,", {-1: 4}, start=1200))
    assert times(utterance) == [("A", 0.05, 0.075), ("cat,", 0.1, 0.2)]


def test_a_number_has_the_times_of_all_its_words(tmp_path):
    spoken = "A cat, five thirty."
    phonemes = "ɐ kˈæt, fˈIv θˈɜɹɾi."
    (utterance,) = read(tmp_path, line("A cat, 5:30.", phonemes, {}, spoken=spoken))
    assert times(utterance) == [("A", 0.025, 0.05), ("cat,", 0.075, 0.175), ("5:30.", 0.225, 0.5)]


@pytest.mark.parametrize(
    "more",
    [{"start": None}, {"phonemes": "bbbbbbb"}, {"text": "For 5:30", "spoken": "A cat, five"}],
    ids=["no start", "other sounds", "unclear numbers"],
)
def test_times_that_are_not_known_are_none(tmp_path, more):
    (utterance,) = read(tmp_path, line("A cat,", "ɐ kˈæt,", {}) | more)
    assert times(utterance) is None


@pytest.mark.parametrize(
    ("written", "spoken", "owners"),
    [
        ("Call 555-1234 now.", "Call one two three now", [0, 1, 1, 1, 2]),
        ("a b", "c d", [0, 1]),
        ("On May 5, 1984.", "On May fifth, nineteen eighty-four.", [0, 1, 2, 3, 3]),
        ("It is 5 20 now", "It is five twenty past now", None),
    ],
)
def test_spoken_words_belong_to_written_ones(written, spoken, owners):
    assert written_words(written.split(), spoken.split()) == owners


def test_sounds_are_paired_in_the_order_that_changes_least():
    assert align("kæts", "kæt") == [(0, 0), (1, 1), (2, 2)]
    assert align("kt", "kæt") == [(0, 0), (1, 2)]
    assert align("kɪt", "kæt") == [(0, 0), (1, 1), (2, 2)]
    assert align("abc", "xyz") is None
    assert align("abc", "") is None


def test_csm_jax_finetune_reads_conversations_with_words(tmp_path, monkeypatch):
    import conversations

    monkeypatch.setattr(
        conversations, "word_times", lambda each: word_times(each, ALONE.__getitem__)
    )
    lines = [
        line(text, phonemes, {}, voice=voice, audio=f"{voice}/{text[0]}.ogg", start=start)
        for voice in MAIN_VOICES
        for text, phonemes, start in [("A cat,", "ɐ kˈæt,", 0), ("The dog.", "", None)]
    ]
    utterances = read(tmp_path, *lines)
    files = {each.audio: f"codes/{each.audio.stem}.npy" for each in utterances}
    out = tmp_path / "train.jsonl"
    write_conversations(out, utterances, count=20, seconds=20.0, seed=0, files=files)
    found, problems = read_conversations(out)
    assert len(found) == 20
    assert not problems
    turns = [turn for each in found for turn in each.turns]
    assert {turn.words is None for turn in turns if turn.text == "The dog."} == {True}
    assert {turn.words[1].start for turn in turns if turn.text == "A cat,"} == {0.075}
    assert {turn.audio.parent for turn in turns} == {tmp_path / "codes"}


def test_the_voice_is_small_enough_for_the_package():
    """At most 45 MB in bfloat16, with a megabyte for the tokenizer and the recordings."""
    shapes = jax.tree.leaves(native_format.param_shapes(VOICE_MODEL))
    assert 2 * sum(shape.size for shape in shapes) <= 44.2e6
