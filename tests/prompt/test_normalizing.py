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
    "10/12 or 24/7": "10/12 or 24/7",
    "v1.2.3 at 192.168.0.1:8080": "v1.2.3 at 192.168.0.1:8080",
    "F-16, COVID-19, 16:9 and 1:05:09": "F-16, COVID-19, 16:9 and 1:05:09",
    "10\u207b\u00b3 or 5\u2030": "10\u207b\u00b3 or 5\u2030",
    "1.234,56 or 1e10": "1.234,56 or 1e10",
    "at 5 in the morning, 1 in 10": "at five in the morning, one in ten",
    "on 03/04/2026": "on 03/04/2026",
    "if a < 3 and b > 2": "if a < three and b > two",
}
FURTHER = {
    # Money
    "US$20 or 5 USD": "twenty US dollars or five US dollars",
    "20€, 5 €, £0.50, 99¢ and 100$": "twenty euros, five euros, fifty pence, ninety-nine cents and "
    "one hundred dollars",
    "₹500 and CHF 20": "five hundred rupees and twenty Swiss francs",
    "-$5": "minus five dollars",
    "$5-10 million, $5\u2013$10": "five to ten million dollars, five to ten dollars",
    "$2k/month": "two thousand dollars per month",
    # Dates and times
    "Meet at 3pm or 3 p.m. today, or 4 p.m.": "Meet at three PM or three PM today, or four PM.",
    "3-4 pm, 10am-2pm, 10:00 \u2013 11:30": "three to four PM, ten AM to two PM, ten o'clock to "
    "eleven thirty",
    "11/25/2026 or 25.11.2026": "November twenty-fifth, twenty twenty-six or November "
    "twenty-fifth, twenty twenty-six",
    "Nov. 26, 2026": "November twenty-sixth, twenty twenty-six",
    "2026-11-26T10:30:00Z": "November twenty-sixth, twenty twenty-six at ten thirty UTC",
    "the 1990s, the '80s, within 30s": "the nineteen nineties, the eighties, within thirty seconds",
    "1980-1985": "nineteen eighty to nineteen eighty-five",
    # Measures
    "3-5 km, 10\u201320%, 5%-10%": "three to five kilometers, ten to twenty percent, five to ten "
    "percent",
    "20 m², 3 m/s, 5 GB/s": "twenty square meters, three meters per second, five gigabytes per "
    "second",
    "6'2\" or 5ft 3in": "six foot two or five feet three inches",
    "5 in wide, 20 kWh": "five inches wide, twenty kilowatt hours",
    # Numbers
    "a 5-year-old": "a five-year-old",
    "pages 12-15": "pages twelve to fifteen",
    "1/2 cup, 2 3/4, 1½ hours": "one half cup, two and three quarters, one and a half hours",
    "2+2=4 and 5 \u00d7 3": "two plus two equals four and five times three",
    "~100, \u00b15, #1": "about one hundred, plus or minus five, number one",
    "10\u00a0000 or 1 000 000": "ten thousand or one million",
    "0.05 -0.5 .5": "zero point zero five minus zero point five zero point five",
    "call +1 (555) 123-4567": "call plus one, five five five, one two three, four five six seven",
    "1-800-555-0199": "one, eight zero zero, five five five, zero one nine nine",
    "555-1234": "five five five, one two three four",
    # Markup
    "<b>Bold</b><br/>and &amp;amp; &quot;more&quot;<!-- no -->": 'Bold and & "more"',
    '<speak><prosody rate="slow">Hi</prosody></speak>': "Hi",
    "Fine[^1] [words][1]\n\n[1]: https://example.com": "Fine words",
    "\\*not bold\\* \\[a\\]": "not bold [a]",
    "Hi :smile: :) ;-) <3": "Hi",
    "See example.com or github.com/a/b.": "See example dot com or github dot com.",
    "ftp://user:secret@example.org/x": "example dot org",
    "Acme\u2122 \u00a9": "Acme",
}


@pytest.mark.parametrize("text", SAME)
def test_a_text_of_words_stays_as_it_is(text):
    assert normalize_text(text) == text


@pytest.mark.parametrize("text", SPOKEN | FURTHER)
def test_a_text_becomes_what_a_person_would_say(text):
    assert normalize_text(text) == (SPOKEN | FURTHER)[text]


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
REPEATED += ["9" * 15 + " ", "1", "<break ", "[pause:", "<b ", "<!--", "&amp;", "a.com", ":a", "1-"]
REPEATED += ["1:00-", "$1-", "1+", "1 000", "+1 ", "\\*", "[^", "[a][", "http://a:b@", "3 p.m. "]


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
