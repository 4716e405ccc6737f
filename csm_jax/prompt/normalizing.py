"""English texts as they are read aloud: without markup, with numbers as words.

Off unless it is asked for, because the reference speaks texts as they are. The number words are
num2words'; what this package knows itself is where in a text numbers, dates, amounts and units are.
"""

import re
import unicodedata
from collections.abc import Callable

from csm_jax.errors import InputError
from csm_jax.prompt import amounts, dates
from csm_jax.prompt.amounts import END, NUMBER, START, TIGHT_DASH
from csm_jax.prompt.markup import strip_markup
from csm_jax.prompt.number_words import digits, fraction, num2words, words
from csm_jax.prompt.pauses import MARK

_SIGNS = {"~": "about", "\u2248": "about", "\u00b1": "plus or minus", "#": "number"}
_SIGNS |= {"\u2265": "at least", "\u2264": "at most"}
_OPERATORS = {"+": "plus", "=": "equals", "\u00d7": "times", "\u00f7": "divided by"}
_SIGN = re.compile(rf"{START}(?:([~\u2248\u00b1\u2265\u2264]) ?(?=[$€£¥]?\.?\d)|(#)(?=\d+{END}))")
_SUM = re.compile(rf"{START}(?:{NUMBER})(?: ?[+=\u00d7\u00f7] ?(?:{NUMBER}))+{END}")
# Spaces that group digits; plain ones do so only where nothing but zeros follows.
_GROUPED = re.compile(r"(?<![\d.,])(\d{1,3}(?:[\u00a0\u202f\u2009]\d{3})+|[1-9]\d{0,2}(?: 000)+)\b")
_FRACTION = re.compile(rf"{START}(?:(\d{{1,3}}) )?([1-7])/([2348]){END}")
_FRACTION_SIGN = re.compile(r"(?:\b(\d{1,3}) ?)?([\u00bc-\u00be\u2150-\u215e])")
_ORDINAL = re.compile(rf"{START}(\d{{1,3}}(?:,\d{{3}})+|\d+)(?:st|nd|rd|th){END}")
_RANGE = re.compile(rf"{START}({NUMBER}){TIGHT_DASH}({NUMBER}){END}")
_PLAIN = re.compile(rf"{START}([-\u2212]?)({NUMBER}){END}")


def normalize_text(text: str) -> str:
    """A text as it is read aloud in English.

    Markdown, HTML and emoji are taken off; of a link its words stay, of a URL its host ("example
    dot com"). Numbers, dates, times, telephone numbers, amounts of money and units become words; a
    number that touches what is not understood ("v1.2.3") stays as it is. Marks of pauses
    (`pauses.py`) stay.

    Raises:
      InputError: it is no text, or num2words is missing.
    """
    if not isinstance(text, str):
        raise InputError(f"the text is of type {type(text).__name__}, but must be a str")
    pieces, start = [], 0
    for mark in MARK.finditer(text):
        pieces += [_normalize(text[start : mark.start()]), mark[0]]
        start = mark.end()
    return " ".join(filter(None, [*pieces, _normalize(text[start:])]))


def check_library() -> None:
    """Raises `InputError` if num2words is missing, which otherwise the first number finds out."""
    num2words()


def _normalize(text: str) -> str:
    text = _GROUPED.sub(lambda found: re.sub(r"\s", "", found[0]), text)
    text = strip_markup(text)
    for pattern, speak in _NUMBERS:
        text = pattern.sub(speak, text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ([.,;:!?]+)(?=\s|$)", r"\1", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _speak_sign(found: re.Match) -> str:
    return f"{_SIGNS[found[1] or found[2]]} "


def _speak_sum(found: re.Match) -> str:
    """Words for the signs; the numbers are left to the next patterns."""
    return re.sub(r" ?([+=\u00d7\u00f7]) ?", lambda sign: f" {_OPERATORS[sign[1]]} ", found[0])


def _speak_fraction(found: re.Match) -> str:
    return fraction(found[1], int(found[2]), int(found[3])) or found[0]


def _speak_fraction_sign(found: re.Match) -> str:
    above, _, below = unicodedata.normalize("NFKC", found[2]).partition("\u2044")
    if not (above and below):
        return found[0]
    return fraction(found[1], int(above), int(below)) or found[0]


def _speak_range(found: re.Match) -> str:
    if any(_is_code(number) for number in found.groups()):
        return found[0]
    return f"{words(found[1])} to {words(found[2])}"


def _speak_plain(found: re.Match) -> str:
    if _is_code(found[2]):
        return digits(found[2])
    return f"{'minus ' if found[1] else ''}{words(found[2])}"


def _is_code(number: str) -> bool:
    """Whether a number has leading zeros, as 007, and is read by its digits."""
    return len(number) > 1 and number.startswith("0") and "." not in number


def _speak_ordinal(found: re.Match) -> str:
    return words(found[1], "ordinal")


# In this order: a date is no sum of numbers, and 1984 no plain one.
_NUMBERS: list[tuple[re.Pattern, Callable[[re.Match], str]]] = [
    (_FRACTION_SIGN, _speak_fraction_sign),
    (dates.ISO_DATE, dates.speak_iso_date),
    (dates.SHORT_DATE, dates.speak_short_date),
    (dates.MONTH_DAY, dates.speak_month_day),
    (dates.PHONE, dates.speak_phone),
    (dates.TIME, dates.speak_time),
    (_SIGN, _speak_sign),
    (_SUM, _speak_sum),
    (amounts.MONEY, amounts.speak_money),
    (amounts.MONEY_BEHIND, amounts.speak_money_behind),
    (dates.DECADE, dates.speak_decade),
    (amounts.FEET, amounts.speak_feet),
    (amounts.MEASURE, amounts.speak_measure),
    (_FRACTION, _speak_fraction),
    (_ORDINAL, _speak_ordinal),
    (dates.YEARS, dates.speak_years),
    (dates.YEAR, dates.speak_year),
    (_RANGE, _speak_range),
    (_PLAIN, _speak_plain),
]
