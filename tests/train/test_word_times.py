"""Word times of training data: which are read, and which rows of text they make of each frame."""

import json

import numpy as np
import pytest
from fixtures import CONFIG, TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from csm_jax.inference.alignment.formats import write_words
from csm_jax.inference.alignment.words import Word
from csm_jax.prompt.turns import Segment, join_rows, turn_rows
from csm_jax.train.batches import make_batch
from csm_jax.train.data import RecordedConversation, RecordedTurn, read_conversations
from csm_jax.train.examples import Selection, make_examples
from csm_jax.train.spoken_rows import spoken_rows
from csm_jax.train.word_times import TimedWord

TURN = {"speaker": 0, "text": "Hi, you two.", "audio": "a.wav"}
WORDS = [
    {"text": "Hi,", "start": 0.0, "end": 0.16},
    {"text": "you", "start": 0.24, "end": 0.3},
    {"text": "two.", "start": 0.3, "end": 0.56},
]
TIMED = tuple(TimedWord(**word) for word in WORDS)


def read(directory, **more):
    (directory / "data.jsonl").write_text(json.dumps([TURN | more]) + "\n")
    return read_conversations(directory / "data.jsonl")


def turn(**fields) -> RecordedTurn:
    values = {"speaker": 0, "text": TURN["text"], "audio": None, "is_trainable": True}
    return RecordedTurn(**(values | fields))


# --- What is read ---------------------------------------------------------------------------------


def test_a_turn_has_the_times_of_its_words_if_they_are_given(tmp_path):
    (without,), _ = read(tmp_path)
    assert without.turns[0].words is None
    (found,), problems = read(tmp_path, words=WORDS)
    assert not problems
    assert found.turns[0].words == TIMED


def test_a_file_of_csm_jax_align_gives_the_times(tmp_path):
    words = [Word(word.text, word.start, word.end, confidence=0.5) for word in TIMED]
    write_words(tmp_path / "a.json", words, 0.6)
    (found,), problems = read(tmp_path, words="a.json")
    assert not problems
    assert found.turns[0].words == TIMED


def changed(index: int, **more) -> list:
    return [*WORDS[:index], WORDS[index] | more, *WORDS[index + 1 :]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (5, "turn 1: words are 5, expected a list or a file's name"),
        ([5, *WORDS[1:]], "turn 1: word 1: expected an object with text, start and end"),
        (WORDS[:2], "turn 1: there are 2 words, but 3 in the text"),
        (changed(1, text="me"), "turn 1: word 2 is 'me', but 'you' in the text"),
        (changed(1, text=1), "turn 1: word 2: text is 1, expected str"),
        (changed(1, stop=1), "turn 1: word 2: unknown field stop"),
        ([{"text": "Hi,", "start": 0}, *WORDS[1:]], "turn 1: word 1: field end is missing"),
        (changed(1, start=-1), "turn 1: word 2: start is -1, expected seconds from 0"),
        (changed(1, end=float("nan")), "turn 1: word 2: end is nan, expected seconds from 0"),
        (changed(1, end=True), "turn 1: word 2: end is True, expected seconds from 0"),
        (changed(1, end=0.2), "turn 1: word 2: it ends at 0.2 s, before it starts at 0.24 s"),
        ("gone.json", "gone.json cannot be read: No such file or directory"),
        ("data.jsonl", "data.jsonl: word 1: unknown field audio"),
    ],
)
def test_words_that_are_not_those_of_the_text_are_one_line(tmp_path, words, message):
    found, (problem,) = read(tmp_path, words=words)
    assert not found
    assert message in problem.message
    assert "\n" not in problem.message


# --- What is spoken in a frame --------------------------------------------------------------------


def texts_of(rows: np.ndarray, text: str) -> list[str]:
    """The bytes of the text in each range of rows; BOS and "[0]" are before it."""
    return [text.encode()[start - 4 : end - 4].decode() if end else "" for start, end in rows]


def test_the_rows_of_a_frame_are_those_of_the_words_that_are_spoken_in_it():
    """Frames of 80 ms: "you" and "two." share the fourth, and a pause has none."""
    rows = spoken_rows(turn(words=TIMED), 8, CONFIG, TOKENIZER, diagonal=0.0)
    assert rows.dtype == np.int32
    expected = ["Hi,", "Hi,", "", "you two.", "two.", "two.", "two.", ""]
    assert texts_of(rows, TURN["text"]) == expected


def test_a_word_that_is_not_spoken_is_in_no_frame():
    words = [TIMED[0], TimedWord("you", 0.1, 0.1), TIMED[2]]
    rows = spoken_rows(turn(words=words), 8, CONFIG, TOKENIZER, diagonal=0.3)
    assert texts_of(rows, TURN["text"]) == ["Hi,", "Hi,", "", *4 * ["two."], ""]


def test_without_times_or_diagonal_nothing_is_known():
    rows = spoken_rows(turn(), 5, CONFIG, TOKENIZER, diagonal=0.0)
    np.testing.assert_array_equal(rows, np.zeros((5, 2)))


@given(st.text("ab, ", min_size=1, max_size=30), st.integers(1, 60), st.floats(0.01, 1))
def test_the_diagonal_is_a_band_from_the_first_row_to_the_last(text, num_frames, width):
    text = f"a{text}b"
    rows = spoken_rows(turn(text=text), num_frames, CONFIG, TOKENIZER, diagonal=width)
    first, end = rows.T
    assert (np.diff(first) >= 0).all()
    assert (np.diff(end) >= 0).all()
    assert (first < end).all()
    # Even speech is at this character in the middle of the frame.
    place = (np.arange(num_frames) + 0.5) / num_frames * len(text)
    assert (first - 4 <= place).all()
    assert (place <= end - 4).all()
    assert (end - first <= 2 * width * len(text) + 2).all()
    assert first.min() >= 4
    assert end.max() <= 4 + len(text)


def test_examples_and_batches_have_positions_of_the_whole_conversation():
    codes = {path: np.full((7, CONFIG.num_codebooks), 5, np.int32) for path in ("a", "b")}
    turns = (turn(audio="a"), turn(speaker=1, audio="b", words=TIMED))
    conversations = [RecordedConversation(1, turns)]
    selection = Selection(is_guided=True)
    (made,), problems = make_examples(conversations, codes, CONFIG, TOKENIZER, selection)
    assert not problems
    parts = [
        turn_rows(Segment(i, TURN["text"], codes=codes["a"]), CONFIG, TOKENIZER) for i in (0, 1)
    ]
    frames, _ = join_rows([*parts[0], *parts[1]])
    np.testing.assert_array_equal(made.frames, frames)
    words = ["".join(map(chr, _bytes(frames[start:end, -1]))) for start, end in made.spoken]
    pause = len(frames) // 2 + len(parts[1][0].frames)
    assert not any(words[:pause])
    assert words[pause:] == ["Hi,", "Hi,", "", "you two.", "two.", "two.", "two.", ""]
    batch = make_batch([made], 2)
    np.testing.assert_array_equal(batch.spoken[0, : len(frames)], made.spoken)
    assert not batch.spoken[0, len(frames) :].any()
    assert not batch.spoken[1].any()


def test_examples_that_are_not_guided_have_no_rows():
    codes = {"a": np.full((7, CONFIG.num_codebooks), 5, np.int32)}
    conversations = [RecordedConversation(1, (turn(audio="a", words=TIMED),))]
    (made,), _ = make_examples(conversations, codes, CONFIG, TOKENIZER, Selection())
    assert made.spoken is None
    assert make_batch([made], 1).spoken is None


def _bytes(ids: np.ndarray) -> list[int]:
    """Bytes of ids of the byte tokenizer, whose ids are those of the printable alphabet."""
    alphabet = {TOKENIZER.encode(chr(byte))[1]: byte for byte in range(32, 127)}
    return [alphabet[int(each)] for each in ids]
