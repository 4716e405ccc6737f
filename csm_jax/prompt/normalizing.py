"""English texts as they are read aloud: without markup, with numbers as words.

Off unless it is asked for, because the reference speaks texts as they are. The number words are
num2words'; what this module knows itself is where in a text numbers, dates, amounts and units are.
"""

import functools
import re
from collections.abc import Callable

from csm_jax.errors import InputError
from csm_jax.prompt.pauses import MARK

_EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0f\u200d\u20e3\U000e0020-\U000e007f]+"
)
# The target of a link, which may have parentheses, and its title.
_TARGET = r"\((?:[^()\s]|\([^()\s]*+\))*+(?:\s+\"[^\"\n]{0,200}\")?\)"
# What stays of markdown, in the order in which it is taken off. Strangers' texts come here, so no
# pattern may search to the end of a text from each of its characters: runs are possessive, or end
# at what can begin the next match, and spaces have become single ones before.
_MARKUP: list[tuple[re.Pattern, str | Callable[[re.Match], str]]] = [
    (re.compile(r"^[ \t]*(?:```|~~~).*$", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*(?:[-*_][ \t]*){3,}$", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*\|?(?:[ \t]*:?-+:?[ \t]*\|)+[ \t:-]*$", re.MULTILINE), ""),
    (re.compile(rf"!\[([^\[\]\n]*)\]{_TARGET}"), r"\1"),
    (re.compile(rf"\[([^\[\]\n]*)\]{_TARGET}"), r"\1"),
    (re.compile(r"<(https?://[^<>\s]+)>"), r"\1"),
    (re.compile(r"^[ \t]*(?:>[ \t]*)+", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*#{1,6}[ \t]+(.*)$", re.MULTILINE), lambda found: _heading(found[1])),
    (re.compile(r"^[ \t]*[-*+\u2022][ \t]+(?:\[[ xX]\][ \t]+)?", re.MULTILINE), ""),
    (re.compile(r"`+([^`\n]*)`+"), r"\1"),
    (re.compile(r"(\*{1,3}|~~)(?=\S)([^*~\n]+?)(?<=\S)\1"), r"\2"),
    (re.compile(r"(?<!\w)(_{1,3})(?=\S)([^_\n]+?)(?<=\S)\1(?!\w)"), r"\2"),
    (re.compile(r"^[ \t]*\|[ \t]*(.*?)[ \t]*\|[ \t]*$", re.MULTILINE), r"\1"),
    (re.compile(r"[ \t]+\|[ \t]+"), ", "),
]
_URL = re.compile(r"\b(?:https?://|www\.)[^\s<>\"')\]]+[^\s<>\"')\].,;:!?]", re.IGNORECASE)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+\b")
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?"
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "", ""),
}
_MAGNITUDES = {"k": "thousand", "m": "million", "bn": "billion", "b": "billion", "tn": "trillion"}
_UNITS = {
    "mm": "millimeter", "cm": "centimeter", "m": "meter", "km": "kilometer",
    "mg": "milligram", "g": "gram", "kg": "kilogram", "ml": "milliliter", "l": "liter",
    "ms": "millisecond", "s": "second", "min": "minute", "h": "hour",
    "Hz": "hertz", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz",
    "KB": "kilobyte", "kB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte",
    "km/h": "kilometer per hour", "mph": "mile per hour", "lb": "pound", "lbs": "pound",
    "ft": "foot", "in": "inch", "°C": "degree Celsius", "°F": "degree Fahrenheit", "°": "degree",
    "W": "watt", "kW": "kilowatt", "V": "volt", "%": "percent",
}  # fmt: skip
_PLURALS = {"foot": "feet", "inch": "inches", "hertz": "hertz", "kilohertz": "kilohertz"}
_PLURALS |= {"megahertz": "megahertz", "gigahertz": "gigahertz", "percent": "percent"}
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_MONTHS = "January February March April May June July August September October November December"
_ISO_DATE = re.compile(r"(?<![\d-])(\d{4})-(\d{2})-(\d{2})(?![\d-])")
_TIME = re.compile(
    r"(?<![\d:.])([01]?\d|2[0-3]):([0-5]\d)(?:[ ]?([ap])\.?m\b\.?)?(?![\d:])", re.IGNORECASE
)
_MONEY = re.compile(
    rf"([$€£¥])\s?({_NUMBER})(?:\s?(k|m|bn|b|tn|thousand|million|billion|trillion)\b)?",
    re.IGNORECASE,
)
_MEASURE = re.compile(rf"(?<![\w.,-])([-\u2212]?)({_NUMBER})\s?({_UNIT})(?![\w/°])")
_ORDINAL = re.compile(r"(?<![\w.,])(\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)\b")
_YEAR = re.compile(r"(?<![\w.,$€£¥-])(1[1-9]\d\d|20\d\d)(?![\w%°]|[.,:-]\d)")
_PLAIN = re.compile(rf"(?<![\w.,])(?<!\d[-/:])([-\u2212]?)({_NUMBER})(?!\w|[-/:.,]\d)")
# num2words has names for numbers up to about this many digits; longer ones are read digit by digit.
_MAX_DIGITS = 15


def normalize_text(text: str) -> str:
    """A text as it is read aloud in English.

    Markdown is taken off, and emoji; of a link its words stay, of a URL its host ("example dot
    com"). Numbers, dates, times, amounts of money and units become words. Marks of pauses
    (`pauses.py`) stay.

    Raises:
      InputError: num2words is missing.
    """
    pieces, start = [], 0
    for mark in MARK.finditer(text):
        pieces += [_normalize(text[start : mark.start()]), mark[0]]
        start = mark.end()
    return " ".join(filter(None, [*pieces, _normalize(text[start:])]))


def _normalize(text: str) -> str:
    text = re.sub(r"[^\S\n]+", " ", _EMOJI.sub(" ", text))
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = _URL.sub(_speak_url, text)
    text = _EMAIL.sub(lambda found: _dotted(found[0].replace("@", " at ")), text)
    for pattern, speak in _NUMBERS:
        text = pattern.sub(speak, text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r"[ ]+([.,;:!?])", r"\1", text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _heading(line: str) -> str:
    """A heading without the signs that may close it: "C#" is none of them."""
    line = line.rstrip()
    opened = line.rstrip("#")
    return opened.rstrip() if opened[-1:] in ("", " ") else line


def check_library() -> None:
    """Raises `InputError` if num2words is missing, which otherwise the first number finds out."""
    _num2words()


def _num2words() -> Callable[..., str]:
    try:
        from num2words import num2words
    except ImportError as error:
        raise InputError(
            "num2words makes words of numbers, and is missing: pip install 'csm-jax[normalize]'"
        ) from error
    return num2words


@functools.lru_cache(4096)
def _words(number: str | int, to: str = "cardinal") -> str:
    num2words = _num2words()
    text = str(number).replace(",", "")
    if len(text.partition(".")[0]) > _MAX_DIGITS:
        return " ".join(_words(digit) for digit in text if digit.isdecimal())
    value = float(text) if "." in text else int(text)
    return num2words(value, to=to).replace(",", "")


def _speak_url(found: re.Match) -> str:
    host = re.sub(r"^(?:https?://)?(?:www\.)?", "", found[0], flags=re.IGNORECASE)
    return _dotted(re.split(r"[/?#:]", host, maxsplit=1)[0])


def _dotted(name: str) -> str:
    return name.replace(".", " dot ")


def _speak_date(found: re.Match) -> str:
    year, month, day = map(int, found.groups())
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return found[0]
    return f"{_MONTHS.split()[month - 1]} {_words(day, 'ordinal')}, {_words(year, 'year')}"


def _speak_time(found: re.Match) -> str:
    hour, minute = int(found[1]), int(found[2])
    half = f" {found[3]} m".upper().replace(" M", "M") if found[3] else ""
    if minute == 0:
        spoken = (
            _words(hour)
            if half
            else f"{_words(hour)} o'clock"
            if 1 <= hour <= 12
            else f"{_words(hour)} hundred"
        )
    else:
        spoken = f"{_words(hour)} {'oh ' if minute < 10 else ''}{_words(minute)}"
    return spoken + half


def _speak_money(found: re.Match) -> str:
    one, many, small_one, small_many = _CURRENCIES[found[1]]
    magnitude = (found[3] or "").lower()
    if magnitude:
        return f"{_words(found[2])} {_MAGNITUDES.get(magnitude, magnitude)} {many}"
    whole, _, part = found[2].replace(",", "").partition(".")
    spoken = f"{_words(whole)} {one if int(whole) == 1 else many}"
    if len(part) != 2 or not small_one:
        return spoken if not part else f"{_words(found[2])} {many}"
    cents = int(part)
    return (
        spoken
        if not cents
        else f"{spoken} and {_words(cents)} {small_one if cents == 1 else small_many}"
    )


def _speak_measure(found: re.Match) -> str:
    name = _UNITS[found[3]]
    if found[2] != "1":
        first, space, rest = name.partition(" ")
        name = _PLURALS.get(first, f"{first}s") + space + rest
    return f"{'minus ' if found[1] else ''}{_words(found[2])} {name}"


def _speak_plain(found: re.Match) -> str:
    if len(found[2]) > 1 and found[2].startswith("0") and "." not in found[2]:
        return " ".join(map(_words, found[2]))  # 007: a number with a leading zero is digits
    return f"{'minus ' if found[1] else ''}{_words(found[2])}"


def _as(kind: str) -> Callable[[re.Match], str]:
    return lambda found: _words(found[1], kind)


# In this order: a date is no sum of numbers, and 1984 no plain one.
_NUMBERS: list[tuple[re.Pattern, Callable[[re.Match], str]]] = [
    (_ISO_DATE, _speak_date),
    (_TIME, _speak_time),
    (_MONEY, _speak_money),
    (_MEASURE, _speak_measure),
    (_ORDINAL, _as("ordinal")),
    (_YEAR, _as("year")),
    (_PLAIN, _speak_plain),
]
