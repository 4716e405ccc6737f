"""Splitting of long texts, sentences of a text in pieces, and the length of speech."""

import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csm_jax.errors import InputError
from csm_jax.prompt.splitting import MAX_CHARACTERS, Sentences, needed_seconds, split_text

SENTENCE = "The quick brown fox jumps over the lazy dog again."  # 50 characters
ACUTE, JOINER = "\u0301", "\u200d"


def dense(text: str) -> str:
    return "".join(text.split())


# --- Splitting ----------------------------------------------------------------------------------

SNIPPETS = [
    *[
        "word",
        "Dr. Who",
        "3.14",
        "e.g.",
        "1,000",
        "10:30",
        "a" * 40,
        "...",
        "\u2026",
        "!?",
        '"Oh."',
    ],
    *[". ", "? ", "! ", ", ", "; ", " \u2014 ", "\u2014", "\n\n", " ", "\t", "\u00a0", "(so.) "],
    *["你好", "。", "，", "！」", "e" + ACUTE, "x" + ACUTE * 9, "👩" + JOINER + "👧", "हिन्दी", "।"],  # noqa: RUF001
]


@pytest.mark.parametrize("seed", range(300))
def test_parts_make_up_the_text_and_keep_the_limit(seed):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(SNIPPETS, size=rng.integers(1, 200)))
    limit = int(rng.choice([1, 2, 7, 30, 100, 300]))
    parts = split_text(text, limit)
    assert dense("".join(parts)) == dense(text)
    for part in parts:
        assert 1 <= len(part) <= limit
        assert part == part.strip()


@pytest.mark.parametrize("length", [1, 299, 300])
def test_a_text_that_fits_is_one_unchanged_part(length):
    text = ("One. Two!\n\nThree;  four, " * 20)[: length - 1] + "x"
    assert split_text(text) == [text]
    assert split_text(f"\n {text} ") == [text]


def test_a_text_that_is_one_character_too_long_is_split():
    text = "x" * 200 + ". " + "y" * (MAX_CHARACTERS - 202)
    assert split_text(text) == [text]
    assert split_text(text + "y") == ["x" * 200 + ".", "y" * (MAX_CHARACTERS - 201)]


@pytest.mark.parametrize("text", ["", " ", "\n\t \u3000"])
def test_white_space_has_no_parts(text):
    assert split_text(text) == []


def test_runs_of_white_space_are_shortened_in_a_text_that_is_split():
    part = "a \t b\n\n\u00a0" + "x" * 296
    assert split_text(part + " y") == ["a b", "x" * 296 + " y"]
    assert split_text(part[:300]) == [part[:300]]


def test_parts_hold_as_many_sentences_as_fit():
    parts = split_text(" ".join([SENTENCE] * 15))  # five have 254 characters, six have 305
    assert parts == [" ".join([SENTENCE] * 5)] * 3


def test_the_last_two_parts_are_about_equally_long():
    parts = split_text(" ".join([SENTENCE] * 11))
    assert [part.count(SENTENCE) for part in parts] == [5, 3, 3]
    words = split_text(" ".join(["word"] * 21), 100)  # 104 characters without punctuation
    assert [part.count("word") for part in words] == [10, 11]


ENDS = {
    "full stop": ("One two. Three four.", ["One two.", "Three four."]),
    "question": ("one two? three four", ["one two?", "three four"]),
    "exclamation": ("one two?! three four", ["one two?!", "three four"]),
    "quotes": ('"One two." Three four', ['"One two."', "Three four"]),
    "typographic quotes": ("“One two!” three four", ["“One two!”", "three four"]),
    "brackets": ("(One two.) Three four", ["(One two.)", "Three four"]),
    "ellipsis": ("One two... Three four", ["One two...", "Three four"]),
    "one-character ellipsis": ("One two… Three four", ["One two…", "Three four"]),
    "line": ("One two\nthree, four", ["One two", "three, four"]),
    "paragraph": ("One two \n\n three, four", ["One two", "three, four"]),
    "Chinese": ("一二三四五六。七八，九十一二", ["一二三四五六。", "七八，九十一二"]),  # noqa: RUF001
    "Japanese": ("「一二三四五！」七八、九十一二", ["「一二三四五！」", "七八、九十一二"]),  # noqa: RUF001
    "a year": ("It is 1999. Three four", ["It is 1999.", "Three four"]),
    "no": ("I say no. Three four", ["I say no.", "Three four"]),
}


@pytest.mark.parametrize(("text", "parts"), ENDS.values(), ids=ENDS.keys())
def test_texts_are_split_at_ends_of_sentences(text, parts):
    assert split_text(text, len(" ".join(text.split())) - 1) == parts


WHOLE = [
    *["Mr. Brown", "Mrs. Brown", "Dr. Who", "Prof. Brown", "St. Mary", "cats vs. dogs", '"Dr. Who'],
    *["J. Brown", "J. R. R. Brown", "e.g. Brown", "i.e. Brown", "cats etc. and", "No. 5", "no. 5"],
    *["the U.S. Navy", "at 9 a.m. Monday", "3.14", "1. First", "well... then", "well… then"],
]  # fmt: skip


@pytest.mark.parametrize("phrase", WHOLE)
def test_some_full_stops_do_not_end_a_sentence(phrase):
    """With every limit that the sentence fits, the text is cut only before and after it."""
    before, after = "Aa aa aa aa aa aa.", "Bb bb bb bb bb bb."
    sentence = f"Cc cc {phrase} cc cc."
    allowed = {before, sentence, after, f"{before} {sentence}", f"{sentence} {after}"}
    longest = max(map(len, (before, sentence, after)))
    for limit in range(longest, len(before) + len(sentence) + len(after) + 2):
        assert set(split_text(f"{before} {sentence} {after}", limit)) <= allowed


CLAUSES = {
    "semicolon": ("one two; three four.", ["one two;", "three four."]),
    "colon": ("one two: three four.", ["one two:", "three four."]),
    "comma": ("one two, three four.", ["one two,", "three four."]),
    "dash": ("one two — three four.", ["one two —", "three four."]),
    "close dash": ("one two—three four.", ["one two—", "three four."]),
    "Chinese": ("一二三四五，六七八九十。", ["一二三四五，", "六七八九十。"]),  # noqa: RUF001
    "numbers": ("in 1,000 or 10:30 ok, so on.", ["in 1,000 or 10:30 ok,", "so on."]),
}


@pytest.mark.parametrize(("text", "parts"), CLAUSES.values(), ids=CLAUSES.keys())
def test_a_sentence_that_is_too_long_is_cut_at_clauses(text, parts):
    assert split_text(text, len(text) - 1) == parts


def test_a_sentence_that_fits_is_not_split_to_fill_the_part_before():
    short, long = "Yes.", "a" * 60 + ", " + "b" * 60 + "."
    assert split_text(f"{short} {long}", 100)[-1] == "b" * 60 + "."
    assert split_text(f"{SENTENCE} {SENTENCE[:-1]}, {SENTENCE}", 110) == [
        SENTENCE,
        f"{SENTENCE[:-1]}, {SENTENCE}",
    ]


def test_a_word_that_is_too_long_is_split_anywhere():
    parts = split_text("x" * 5000)
    assert [len(part) for part in parts] == [300] * 15 + [250, 250]


def test_letters_are_not_split_from_their_accents():
    assert split_text(("e" + ACUTE) * 6, 5) == [("e" + ACUTE) * 2] * 3
    family = JOINER.join("👩👧👦")
    assert split_text(family * 3, 9) == [family] * 3
    assert split_text("e" + ACUTE * 5, 4) == ["e" + ACUTE * 2, ACUTE * 3]


MANY = 100_000
HOSTILE = {
    "dots": ("." * MANY, MANY),
    "dots and brackets": (".)" * MANY, 2 * MANY),
    "brackets": ("." + ")" * MANY, MANY + 1),
    "commas": ("," * MANY, MANY),
    "spaces": ("a" * 301 + " " * MANY + "b", 302),
    "accents and spaces": ("e" + ACUTE * 400 + " " * MANY + "b", 402),
    "lines": ("a" * 301 + "\n" * MANY + "b", 302),
    "initials": ("J. " * MANY, 2 * MANY),
}


@pytest.mark.parametrize(("text", "characters"), HOSTILE.values(), ids=HOSTILE.keys())
def test_splitting_takes_linear_time(text, characters):
    """Quadratic time would be a minute or more for each."""
    start = time.process_time()
    parts = split_text(text)
    assert time.process_time() - start < 10
    assert len(dense("".join(parts))) == characters


@pytest.mark.parametrize("limit", [0, -5])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(InputError, match=rf"^max_characters is {limit}, but must be at least 1$"):
        split_text("hello", limit)


# --- Length -------------------------------------------------------------------------------------


def test_needed_seconds_has_a_quarter_of_a_second_for_a_letter():
    assert needed_seconds("") == 6.0
    assert needed_seconds("abcdefgh") == 8.0
    assert needed_seconds("abcd, efg.") == 8.25


TEXTS = [
    SENTENCE,
    "Hi.",
    "He paid $1,777,777.77 for it, or 12.5% of 100.",
    "The FBI, the NSA and the WWW.",
    "3.14159265358979",
    "我们明天早上九点在车站见面好吗",
    "안녕하세요 만나서 반갑습니다",
    "これはとてもながいぶんしょうです",
    "%%%",
]
SPOKEN = {
    TEXTS[2]: "He paid one million seven hundred seventy-seven thousand seven hundred seventy-seven"
    " dollars and seventy-seven cents for it or twelve point five percent of one hundred",
    TEXTS[3]: "The eff bee eye the enn ess ay and the double-u double-u double-u",
    TEXTS[4]: "three point one four one five nine two six five three five eight nine seven nine",
    TEXTS[5]: "women mingtian zaoshang jiudian zai chezhan jianmian hao ma",
    TEXTS[6]: "annyeonghaseyo mannaseo bangapseumnida",
    TEXTS[7]: "kore wa totemo nagai bunsho desu",
    TEXTS[8]: "percent percent percent",
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_bound_is_twice_as_long_as_slow_speech(text):
    """The bound is over 3 s and twice the spoken text, symbols included, at 8 letters a second."""
    spoken = dense(SPOKEN.get(text, text))
    assert needed_seconds(text) > 2 * len(spoken) / 8 + 3


@pytest.mark.parametrize("text", [SENTENCE, "x" * 300, " ".join(["lorem ipsum"] * 20)])
def test_the_bound_is_not_too_loose(text):
    """The limit is four times the time at 14 letters a second, and 6 s."""
    assert needed_seconds(text) <= 6 + 4 * len(dense(text)) / 14


def test_white_space_and_accents_take_no_time():
    assert needed_seconds("a" + " " * 500 + "b\n\n\t\u3000\u200b") == needed_seconds("ab")
    assert needed_seconds("e" + ACUTE * 500) == needed_seconds("e")


def test_the_parts_may_take_as_long_as_the_text():
    text = " ".join([SENTENCE] * 20)
    parts = split_text(text)
    total = sum(needed_seconds(part) - needed_seconds("") for part in parts)
    assert total == pytest.approx(needed_seconds(text) - needed_seconds(""))


@example(["5", "\n. 5", ""])
@given(st.lists(st.text("aB5.!。…\"' \n", max_size=6), max_size=30))
def test_sentences_do_not_depend_on_the_pieces(pieces):
    """The result is compared with a search of the whole rest."""
    stored, rest = Sentences(), ""
    for piece in pieces:
        fresh = Sentences()
        assert stored.add(piece) == fresh.add(rest + piece)
        assert len(stored) == len(fresh)
        rest = fresh._rest
    assert stored.take_rest() == rest.strip()


@pytest.mark.parametrize("text", ["a" * 10_000, "e.g. " * 2000, "." * 10_000, "a? b" * 2500])
def test_adding_a_character_does_not_search_the_whole_text(text):
    sentences = Sentences()
    sentences.add(text)
    started = time.process_time()
    for _ in range(1000):
        sentences.add("b")
    assert time.process_time() - started < 0.5
