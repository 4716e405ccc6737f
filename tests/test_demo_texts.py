"""Training texts of the open-vocabulary voice: numbers, dialogues, book sentences, their order."""

import itertools
import random
import re
import string

import pytest
from books import LONGEST_PART, is_speakable, normalize, parts, sentences
from dialogues import TEMPLATES, draw_dialogue
from plan import MAIN_VOICES, OTHER_VOICES, plan
from spelling import cardinal, clock, draw_percent, draw_price, draw_telephone, ordinal, year
from texts import is_held_out


@pytest.fixture(scope="module")
def normalizer():
    """Whisper's normalizer, which writes number words as numerals."""
    english = pytest.importorskip("transformers.models.whisper.english_normalizer")
    return english.EnglishTextNormalizer({})


def test_whole_numbers_are_normalized_back_to_numerals(normalizer):
    source = random.Random(0)
    numbers = [*range(2, 100), *(source.randrange(100, 10**9) for _ in range(200))]
    # It handles "twenty one" only, and does not change a single "one".
    heard = [normalizer(cardinal(number).replace("-", " ")) for number in numbers]
    assert heard == [str(number) for number in numbers]


def test_large_numbers_name_their_parts():
    assert cardinal(123) == "one hundred twenty-three"
    assert cardinal(7_040_215) == "seven million forty thousand two hundred fifteen"


def test_ordinals_are_normalized_back_to_numerals(normalizer):
    suffixes = {1: "1st", 2: "2nd", 3: "3rd", 11: "11th", 12: "12th", 13: "13th", 20: "20th"}
    suffixes |= {21: "21st", 22: "22nd", 30: "30th", 45: "45th", 100: "100th"}
    for number, written in suffixes.items():
        assert normalizer(ordinal(number).replace("-", " ")) == written


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (1776, "seventeen seventy-six"),
        (1900, "nineteen hundred"),
        (1905, "nineteen oh five"),
        (2000, "two thousand"),
        (2005, "two thousand five"),
        (2010, "twenty ten"),
        (2026, "twenty twenty-six"),
    ],
)
def test_years_are_spelled_in_halves(number, said):
    assert year(number) == said


def test_times_of_day_are_spelled():
    assert [clock(9, 0), clock(7, 5), clock(12, 45)] == [
        "nine o'clock",
        "seven oh five",
        "twelve forty-five",
    ]


@pytest.mark.parametrize("draw", [draw_price, draw_percent])
def test_prices_and_percentages_are_normalized_back_to_their_written_form(normalizer, draw):
    source = random.Random(1)
    for _ in range(50):
        written, spoken = draw(source)
        assert normalizer(spoken) == normalizer(written)


def test_a_telephone_number_is_spelled_digit_by_digit():
    written, spoken = draw_telephone(random.Random(2))
    assert len(re.findall(r"\d", written)) == len(spoken.split()) == 7


def test_dialogues_have_all_placeholders_filled_and_are_spelled_in_words():
    source = random.Random(3)
    for _ in range(1000):
        for written, spoken in draw_dialogue(source):
            assert not set("{}") & set(written + spoken)
            assert not re.search(r"[\d%$]", spoken)
            assert spoken[-1] in ".?!"


def test_a_placeholder_has_the_same_word_in_all_turns_of_a_dialogue():
    source = random.Random(4)
    seen = 0
    while seen < 20:
        turns = draw_dialogue(source)
        match = re.fullmatch(
            r"Which one do you want, the (\w+) one or the (\w+) one\?", turns[0][0]
        )
        if match:
            seen += 1
            assert match[1] != match[2]
            assert turns[1].written == f"The {match[2]} one."


def test_templates_differ():
    first_turns = [turns[0] for turns in TEMPLATES]
    assert len(set(first_turns)) == len(first_turns)
    slots = {slot for turns in TEMPLATES for t in turns for _, slot, _, _ in _fields(t)}
    assert len(slots) > 20


def _fields(template: str):
    return [field for field in string.Formatter().parse(template) if field[1]]


def test_typographic_characters_become_plain_ones():
    assert normalize("“Aye—he’s  here ,” said I .") == "Aye, he's here, said I."


@pytest.mark.parametrize(
    "text",
    [
        "Born in 1819 he went to sea.",
        "Ask Mr. Smith about the ships.",
        "The IRS has written to all of them.",
        "Too short.",
        "and this one begins in the middle.",
        "This one has no end, as far as I can see",
        "A long one " + "and on " * 20 + "it goes.",
        "A stray (parenthesis) is in this one.",
    ],
)
def test_unspeakable_sentences_are_left_out(text):
    assert not is_speakable(text)


def test_adjacent_speakable_sentences_are_joined():
    good = [f"This is a good sentence, and it is the {ordinal(i)}." for i in range(1, 12)]
    paragraph = " ".join([*good[:3], "This one is from 1851.", *good[3:]])
    assert sentences(paragraph)[3] == "This one is from 1851."
    found = list(parts(paragraph))
    assert found[0] == " ".join(good[:3])
    assert all(len(part) <= LONGEST_PART for part in found)
    assert sum(map(len, found)) > 0.8 * sum(map(len, good))
    assert all(part in " ".join(good) for part in found)


def test_a_plan_depends_on_its_seed_and_repeats_no_sentence():
    books = [f"This is a good sentence, and it is the {ordinal(i)}." for i in range(300)]
    longer = [f"{a} {b}" for a, b in zip(books[::2], books[1::2], strict=True)]
    jobs = plan(1000, books, longer, seed=5)
    assert jobs == plan(1000, list(reversed(books)), longer, seed=5)
    assert jobs != plan(1000, books, longer, seed=6)
    assert [job.id for job in jobs] == list(range(len(jobs)))
    said = [job.text for job in jobs if job.text in {*books, *longer}]
    assert len(said) == len(set(said)) > 300


def test_turns_of_a_dialogue_alternate_voices_and_most_voices_are_the_main_ones():
    jobs = plan(4000, [], [], seed=7)
    for before, job in itertools.pairwise(jobs):
        if job.dialogue == before.dialogue:
            assert job.voice != before.voice
    others = sum(job.voice in OTHER_VOICES for job in jobs) / len(jobs)
    assert others == pytest.approx(0.1, abs=0.03)
    assert {job.voice for job in jobs} == {*MAIN_VOICES, *OTHER_VOICES}


def test_held_out_digits_are_not_planned():
    digits = [job.text for job in plan(4000, [], [], seed=8) if job.text.islower()]
    assert len(digits) > 100
    assert not any(is_held_out(text.split()) for text in digits)
