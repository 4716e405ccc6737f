"""Texts as they are read aloud; the words are those that a person would say."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_jax.prompt.normalizing import normalize_text

pytest.importorskip("num2words")

SAME = [
    "Hello there.",
    "It's well-known, isn't it?",
    "a*b",
    "snake_case_name",
    "Grüß dich!",
    "你好。",
]
SPOKEN = {
    # Markdown
    "# Title\n\nSome **bold** and *thin* text.": "Title\nSome bold and thin text.",
    "- one\n* two\n+ three\n> four": "one\ntwo\nthree\nfour",
    "See [the page](https://example.com/a_b).": "See the page.",
    "![A cat](cat.png) sleeps": "A cat sleeps",
    "Run `ls` now.\n```python\nprint()\n```": "Run ls now.\nprint()",
    "~~old~~ __new__ _soft_": "old new soft",
    "| a | b |\n|---|:-:|\n| c | d |": "a, b\nc, d",
    "One.\n\n---\n\nTwo.": "One.\nTwo.",
    "- [x] done": "done",
    "# About C#\n## Title ##\n# #": "About C#\nTitle",
    '[Foo (bar)](https://example.com/Foo_(bar) "A title") is it': "Foo (bar) is it",
    "[![alt](a.png)](https://example.com)": "alt",
    # URLs and addresses
    "Go to https://www.example.com/a?b=1#c.": "Go to example dot com.",
    "www.example.co.uk is it": "example dot co dot uk is it",
    "<http://example.org>": "example dot org",
    "Write to a.b@example.com!": "Write to a dot b at example dot com!",
    # Emoji
    "Great 🎉👍🏽!": "Great!",
    "👨‍👩‍👧 family ❤️ 🇩🇪": "family",
    # Numbers
    "I have 3 cats and 21 dogs.": "I have three cats and twenty-one dogs.",
    "1,234,567 people": "one million two hundred and thirty-four thousand five hundred and "
    "sixty-seven people",
    "Pi is 3.14.": "Pi is three point one four.",
    "-5 or \u22125": "minus five or minus five",
    "agent 007": "agent zero zero seven",
    "the 1st, 2nd and 33rd": "the first, second and thirty-third",
    # Dates and times
    "on 2026-11-25": "on November twenty-fifth, twenty twenty-six",
    "in 1984 and 2005": "in nineteen eighty-four and two thousand and five",
    "at 10:30, 9:05 pm and 12:00": "at ten thirty, nine oh five PM and twelve o'clock",
    # Amounts and units
    "$5, $1 and €2.50": "five dollars, one dollar and two euros and fifty cents",
    "£3.01": "three pounds and one penny",
    "$1.5 million or €3bn": "one point five million dollars or three billion euros",
    "5 km, 1 kg and 20°C": "five kilometers, one kilogram and twenty degrees Celsius",
    "99.9% at 60 km/h": "ninety-nine point nine percent at sixty kilometers per hour",
    "6 ft and 3 in": "six feet and three inches",
    # What only looks like one of them
    "v2 of x86 and B2B": "v2 of x86 and B2B",
    "2026-13-45": "2026-13-45",
    "3-5 km or 10/12": "3-5 km or 10/12",
}


@pytest.mark.parametrize("text", SAME)
def test_a_text_of_words_stays_as_it_is(text):
    assert normalize_text(text) == text


@pytest.mark.parametrize("text", SPOKEN)
def test_a_text_becomes_what_a_person_would_say(text):
    assert normalize_text(text) == SPOKEN[text]


def test_a_number_of_many_digits_is_read_by_digits():
    assert normalize_text("9" * 20) == " ".join(["nine"] * 20)


# Texts on which patterns with two ways to match take quadratic time or more.
REPEATED = ["[", "[a](", "[a](b ", '[a](b "', "![", "*a ", "_a", "`", "#", "# ", "> ", "| ", "|-"]
REPEATED += [
    " ",
    "\u2003",
    "\n",
    " \n",
    "a.",
    "a@",
    "<http://",
    "www.",
    "1,",
    "1-",
    "$1,",
    "[pause:",
]
REPEATED += ["9" * 15 + " ", "1", "<break ", "[pause:"]


@pytest.mark.parametrize("piece", REPEATED)
def test_the_time_does_not_explode(piece):
    """A server normalizes texts of strangers of up to 10 000 characters."""
    start = time.process_time()
    for before, behind in (("", ""), ("# ", "a"), ("|", "a")):
        normalize_text(before + (piece * 10_000)[:10_000] + behind)
    assert time.process_time() - start < 2


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**12))
def test_every_number_becomes_words(number):
    assert not re.search(r"\d", normalize_text(f"There are {number:,} of them."))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_normalized_once_and_for_all(text):
    once = normalize_text(text)
    assert normalize_text(once) == once
