"""Dates, times, years and telephone numbers in English texts."""

import re

from csm_jax.prompt.amounts import DASH, END, START, TIGHT_DASH
from csm_jax.prompt.number_words import decade, digits, words

_MONTHS = "January February March April May June July August September October November December"
_MONTHS = _MONTHS.split()
_SHORT_MONTHS = {month[:3]: month for month in _MONTHS} | {"Sept": "September"}

ISO_DATE = re.compile(
    rf"{START}(\d{{4}})-(\d{{2}})-(\d{{2}})(?:[T ](\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(Z?))?{END}"
)
# Day and month can be told apart where one of them is above 12, or where dots separate them.
SHORT_DATE = re.compile(rf"{START}(\d{{1,2}})([/.])(\d{{1,2}})\2(\d{{4}}){END}")
MONTH_DAY = re.compile(
    rf"\b({'|'.join(_MONTHS)}|(?:{'|'.join(_SHORT_MONTHS)})\b\.?) (\d{{1,2}})(?:st|nd|rd|th)?{END}"
)
_CLOCK = r"([01]?\d|2[0-3])(?::([0-5]\d))?(?:\s?([AaPp])(?:\.[Mm]\.|[Mm]\b))?"
TIME = re.compile(rf"{START}{_CLOCK}(?:{DASH}{_CLOCK})?{END}")
_YEAR = r"1[1-9]\d\d|20\d\d"
DECADE = re.compile(
    rf"(?:{START}((?:1[1-9]|20)\d)0|(?:\b((?:the|his|her|their|my|your|our|early|mid|late)[ -])|"
    rf"{START})['\u2019]?([2-9])0)['\u2019]?s{END}"
)
YEARS = re.compile(rf"{START}({_YEAR}){TIGHT_DASH}({_YEAR}){END}")
YEAR = re.compile(rf"{START}({_YEAR}){END}")
PHONE = re.compile(
    rf"{START}(?:\+\d{{1,3}}[ .-]?(?:\(\d{{1,4}}\)|\d{{1,4}})(?:[ .-]\d{{2,4}}){{1,4}}"
    rf"|\(\d{{3}}\) ?\d{{3}}[ .-]\d{{4}}|(?:1[.-])?\d{{3}}[.-]\d{{3}}[.-]\d{{4}}"
    rf"|\d{{3}}-\d{{4}}){END}"
)


def speak_iso_date(found: re.Match) -> str:
    """Of `ISO_DATE`."""
    year, month, day, time, zone = found.groups()
    if not _is_date(int(month), int(day)):
        return found[0]
    date = _date(int(month), int(day), year)
    if not time:
        return date
    hour, minute = time.split(":")
    return f"{date} at {_time(int(hour), minute, None)}{' UTC' if zone else ''}"


def speak_short_date(found: re.Match) -> str:
    """Of `SHORT_DATE`; the text itself where either number may be the month."""
    first, separator, second, year = found.groups()
    day, month = int(first), int(second)
    if separator == "/" and month > 12:
        day, month = month, day
    is_told = separator == "." or day > 12 or day == month
    return _date(month, day, year) if is_told and _is_date(month, day) else found[0]


def _is_date(month: int, day: int) -> bool:
    return 1 <= month <= 12 and 1 <= day <= 31


def _date(month: int, day: int, year: str) -> str:
    return f"{_MONTHS[month - 1]} {words(day, 'ordinal')}, {words(year, 'year')}"


def speak_month_day(found: re.Match) -> str:
    """Of `MONTH_DAY`."""
    if not 1 <= int(found[2]) <= 31:
        return found[0]
    name = found[1].rstrip(".")
    return f"{_SHORT_MONTHS.get(name, name)} {words(int(found[2]), 'ordinal')}"


def speak_time(found: re.Match) -> str:
    """Of `TIME`; as it is where it has neither minutes nor a half of the day."""
    hour, minute, half, last_hour, last_minute, last_half = found.groups()
    if last_hour is None:
        if not minute and not half:
            return found[0]
        return _time(int(hour), minute, half) + _full_stop(found)
    if not (last_minute or last_half) or not (minute or half or last_half):
        return found[0]
    # "3-4 pm" has one half for both hours.
    first = _time(int(hour), minute, half) if minute or half else words(int(hour))
    return f"{first} to {_time(int(last_hour), last_minute, last_half)}{_full_stop(found)}"


def _full_stop(found: re.Match) -> str:
    """The full stop of a sentence that "p.m." has taken over."""
    behind = found.string[found.end() :].lstrip()
    ends = found[0].endswith(".") and (not behind or behind[0].isupper())
    return "." if ends else ""


def _time(hour: int, minute: str | None, half: str | None) -> str:
    behind = f" {half.upper()}M" if half else ""
    if minute and int(minute):
        return f"{words(hour)} {'oh ' if int(minute) < 10 else ''}{words(int(minute))}{behind}"
    if half:
        return words(hour) + behind
    return f"{words(hour)} o'clock" if 1 <= hour <= 12 else f"{words(hour)} hundred"


def speak_decade(found: re.Match) -> str:
    """Of `DECADE`; "30s" without a word such as "the" are seconds."""
    century, before, ten = found.groups()
    if century:
        return decade(f"{century}0")
    if before is None and found[0][0] not in "'\u2019":
        return found[0]
    return (before or "") + decade(f"{ten}0")


def speak_years(found: re.Match) -> str:
    """Of `YEARS`."""
    return f"{words(found[1], 'year')} to {words(found[2], 'year')}"


def speak_year(found: re.Match) -> str:
    """Of `YEAR`."""
    return words(found[1], "year")


def speak_phone(found: re.Match) -> str:
    """Of `PHONE`: digit by digit."""
    groups = [digits(group) for group in re.findall(r"\d+", found[0])]
    return ("plus " if found[0].startswith("+") else "") + ", ".join(groups)
