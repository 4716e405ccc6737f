"""Numbers as they are written and as they are spoken (American English)."""

import random
from collections.abc import Callable
from typing import NamedTuple

from texts import DIGITS, TEENS, TENS

_SCALES = [(10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred")]
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


class TextForms(NamedTuple):
    """A text in its written and its spoken form."""

    written: str
    spoken: str


def cardinal(number: int) -> str:
    """A whole number below 10**12 in words: "one hundred twenty-three"."""
    if number < 10:
        return DIGITS[number]
    if number < 20:
        return TEENS[number - 10]
    if number < 100:
        tens, rest = TENS[number // 10 - 2], number % 10
        return f"{tens}-{DIGITS[rest]}" if rest else tens
    scale, name = next(each for each in _SCALES if number >= each[0])
    count, rest = divmod(number, scale)
    words = f"{cardinal(count)} {name}"
    return f"{words} {cardinal(rest)}" if rest else words


def ordinal(number: int) -> str:
    """An ordinal number in words: "twenty-third"."""
    words = cardinal(number)
    cut = max(words.rfind(" "), words.rfind("-")) + 1
    last = words[cut:]
    if last in _ORDINALS:
        return words[:cut] + _ORDINALS[last]
    return words[:cut] + (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")


def year(number: int) -> str:
    """A year from 1100 to 2099: "nineteen eighty-four", "two thousand five"."""
    century, rest = divmod(number, 100)
    if 2000 <= number < 2010:
        return cardinal(number)
    if rest == 0:
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def clock(hour: int, minute: int) -> str:
    """A time of day: "five thirty", "seven oh five", "nine o'clock"."""
    if minute == 0:
        return f"{cardinal(hour)} o'clock"
    return f"{cardinal(hour)} {'oh ' if minute < 10 else ''}{cardinal(minute)}"


def draw_count(source: random.Random) -> TextForms:
    number = source.randint(2, 99)
    return TextForms(str(number), cardinal(number))


def draw_amount(source: random.Random) -> TextForms:
    """A whole number of three to seven digits, with commas between the thousands."""
    digits = source.randint(3, 7)
    number = source.randrange(10 ** (digits - 1), 10**digits)
    return TextForms(f"{number:,}", cardinal(number))


def draw_year(source: random.Random) -> TextForms:
    number = source.randint(1600, 2050)
    return TextForms(str(number), year(number))


def draw_date(source: random.Random) -> TextForms:
    month, day = source.choice(MONTHS), source.randint(1, 28)
    return TextForms(f"{month} {day}", f"{month} {ordinal(day)}")


def draw_time(source: random.Random) -> TextForms:
    hour, minute = source.randint(1, 12), source.choice([0, 5, 10, 15, 20, 30, 40, 45, 50])
    return TextForms(f"{hour}:{minute:02}", clock(hour, minute))


def draw_price(source: random.Random) -> TextForms:
    dollars, cents = source.randint(2, 400), source.choice([0, 0, 25, 50, 75, 95, 99])
    spoken = f"{cardinal(dollars)} dollars"
    if not cents:
        return TextForms(f"${dollars}", spoken)
    return TextForms(f"${dollars}.{cents}", f"{spoken} and {cardinal(cents)} cents")


def draw_percent(source: random.Random) -> TextForms:
    whole, tenth = source.randint(1, 99), source.choice([None, None, *range(1, 10)])
    if tenth is None:
        return TextForms(f"{whole}%", f"{cardinal(whole)} percent")
    return TextForms(f"{whole}.{tenth}%", f"{cardinal(whole)} point {cardinal(tenth)} percent")


def draw_telephone(source: random.Random) -> TextForms:
    """Seven digits, spoken one by one, with a pause after three."""
    digits = [source.randrange(10) for _ in range(7)]
    words = [DIGITS[digit] for digit in digits]
    written = "".join(map(str, digits))
    return TextForms(
        f"{written[:3]}-{written[3:]}", f"{' '.join(words[:3])}, {' '.join(words[3:])}"
    )


DRAWS: dict[str, Callable[[random.Random], TextForms]] = {
    "count": draw_count,
    "amount": draw_amount,
    "year": draw_year,
    "date": draw_date,
    "time": draw_time,
    "price": draw_price,
    "percent": draw_percent,
    "telephone": draw_telephone,
}
