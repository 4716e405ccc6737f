"""Amounts of money and measures in English texts."""

import re

from csm_jax.prompt.number_words import words

NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
# A number is read only as a whole, between spaces, brackets and punctuation. What it touches and
# is not understood, as in v1.2.3, F-16 or 10/12, leaves it as it is.
START = r"(?<![^\s(\[\"'\u201c\u2018\u00ab\u2014])(?<!\d['\"])"
END = r"(?![\w/%\u2030°$€£¥¢²³\u00b9\u2070-\u207f^=+*<>@#&\\{}|~])(?!-\d)(?![.,:'\u2019]\d)"
# Of a range. "0 -5" is none.
DASH = r"(?:[-\u2013\u2014]|\s[-\u2013\u2014]\s)"
TIGHT_DASH = "[-\u2013]"
_MINUS = r"[-\u2212]?"

_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "", ""),
    "₹": ("rupee", "rupees", "paisa", "paise"),
    "₩": ("won", "won", "", ""),
    "₽": ("rouble", "roubles", "kopek", "kopeks"),
    "₿": ("bitcoin", "bitcoins", "", ""),
    "¢": ("cent", "cents", "", ""),
    "CHF": ("Swiss franc", "Swiss francs", "centime", "centimes"),
    "R$": ("real", "reais", "centavo", "centavos"),
    "EUR": ("euro", "euros", "cent", "cents"),
    "GBP": ("pound", "pounds", "penny", "pence"),
    "JPY": ("yen", "yen", "", ""),
    "INR": ("rupee", "rupees", "paisa", "paise"),
}
_DOLLARS = {"US": "US", "A": "Australian", "AU": "Australian", "C": "Canadian", "CA": "Canadian"}
_DOLLARS |= {"NZ": "New Zealand", "HK": "Hong Kong", "S": "Singapore"}
_CURRENCIES |= {
    sign: (f"{country} dollar", f"{country} dollars", "cent", "cents")
    for short, country in _DOLLARS.items()
    for sign in (f"{short}$", f"{short}D")
    if sign not in ("AD", "CD", "SD", "CAD", "AUD")
}
_CURRENCIES |= {"AUD": _CURRENCIES["A$"], "CAD": _CURRENCIES["C$"]}
_CURRENCY = "|".join(sorted(map(re.escape, _CURRENCIES), key=len, reverse=True))
_MAGNITUDES = {"k": "thousand", "m": "million", "bn": "billion", "b": "billion", "tn": "trillion"}
_MAGNITUDE = r"(?:\s?(k|m|bn|b|tn|thousand|million|billion|trillion)\b)?"
_PER = {"s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour", "mo": "month"}
_EACH = r"(?:/([a-z]{3,12}|s|h|hr|mo)\b)?"

# The sign before the number, and behind it.
MONEY = re.compile(
    rf"{START}({_MINUS})(?i:({_CURRENCY})\s?({NUMBER})"
    rf"(?:{DASH}(?:\2\s?)?({NUMBER}))?{_MAGNITUDE}{_EACH}){END}"
)
MONEY_BEHIND = re.compile(
    rf"{START}({_MINUS})({NUMBER})(?:{DASH}({NUMBER}))?(?i:{_MAGNITUDE})\s?({_CURRENCY}){_EACH}{END}"
)

_UNITS = {
    "µm": "micrometer", "mm": "millimeter", "cm": "centimeter", "m": "meter", "km": "kilometer",
    "mg": "milligram", "g": "gram", "kg": "kilogram", "ml": "milliliter", "mL": "milliliter",
    "l": "liter", "L": "liter", "ns": "nanosecond", "µs": "microsecond", "ms": "millisecond",
    "s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour", "hrs": "hour",
    "Hz": "hertz", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz",
    "KB": "kilobyte", "kB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte",
    "kbps": "kilobit per second", "Mbps": "megabit per second", "Gbps": "gigabit per second",
    "km/h": "kilometer per hour", "kph": "kilometer per hour", "mph": "mile per hour",
    "rpm": "revolution per minute", "lb": "pound", "lbs": "pound", "oz": "ounce", "mi": "mile",
    "yd": "yard", "ft": "foot", "in": "inch", "sq ft": "square foot",
    "°C": "degree Celsius", "°F": "degree Fahrenheit", "°": "degree", "kcal": "kilocalorie",
    "W": "watt", "kW": "kilowatt", "MW": "megawatt", "kWh": "kilowatt hour", "V": "volt",
    "mAh": "milliampere hour", "dB": "decibel", "%": "percent",
}  # fmt: skip
_LENGTHS = ("mm", "cm", "m", "km", "ft", "in", "mi", "yd")
_POWERS = {"²": "square ", "³": "cubic "}
_SAME_PLURAL = ("hertz", "kilohertz", "megahertz", "gigahertz", "percent")
_PLURALS = {"foot": "feet", "inch": "inches"} | {name: name for name in _SAME_PLURAL}
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
# What follows inches, where it is not the word "in".
_AFTER_INCHES = re.compile(r"\s(?:wide|long|tall|high|deep|thick|by|x)\b|(?!\s\w)")
MEASURE = re.compile(
    rf"{START}({_MINUS})({NUMBER})(?:(\s?(?:{_UNIT}))?{DASH}({NUMBER}))?(\s?)({_UNIT})([²³]?)"
    rf"{_EACH}{END}"
)
FEET = re.compile(rf"{START}(\d{{1,3}})['\u2032]\s?(\d{{1,2}})[\"\u2033]{END}")


def speak_money(found: re.Match) -> str:
    """Of `MONEY`."""
    minus, sign, first, last, magnitude, each = found.groups()
    return _money(minus, sign, first, last, magnitude, each)


def speak_money_behind(found: re.Match) -> str:
    """Of `MONEY_BEHIND`."""
    minus, first, last, magnitude, sign, each = found.groups()
    return _money(minus, sign, first, last, magnitude, each)


def _money(
    minus: str, sign: str, first: str, last: str | None, magnitude: str | None, each: str | None
) -> str:
    names = _CURRENCIES.get(sign) or _CURRENCIES[sign.upper()]
    before, behind = "minus " if minus else "", _per(each)
    if magnitude:
        amount = words(first) if last is None else f"{words(first)} to {words(last)}"
        many = _MAGNITUDES.get(magnitude.lower(), magnitude.lower())
        return f"{before}{amount} {many} {names[1]}{behind}"
    if last is None:
        return before + _sum(first, names) + behind
    if "." in first + last:
        return f"{before}{_sum(first, names)} to {_sum(last, names)}{behind}"
    return f"{before}{words(first)} to {_sum(last, names)}{behind}"


def _sum(number: str, names: tuple[str, str, str, str]) -> str:
    one, many, small_one, small_many = names
    whole, _, part = number.replace(",", "").partition(".")
    spoken = f"{words(whole or 0)} {one if int(whole or 0) == 1 else many}"
    if not part:
        return spoken
    if len(part) != 2 or not small_one:
        return f"{words(number)} {many}"
    cents = int(part)
    small = f"{words(cents)} {small_one if cents == 1 else small_many}"
    if not cents:
        return spoken
    return f"{spoken} and {small}" if int(whole or 0) else small


def _per(each: str | None) -> str:
    return f" per {_PER.get(each, each)}" if each else ""


def speak_measure(found: re.Match) -> str:
    """Of `MEASURE`."""
    minus, first, first_unit, last, gap, unit, power, each = found.groups()
    if (power and unit not in _LENGTHS) or (first_unit and first_unit.strip() != unit):
        return found[0]
    # "5 in the morning" has no inches.
    if unit == "in" and gap and not _AFTER_INCHES.match(found.string, found.end()):
        return found[0]
    amount = words(first) if last is None else f"{words(first)} to {words(last)}"
    name = _UNITS[unit] if amount == "one" else _plural(_UNITS[unit])
    power = _POWERS.get(power, "")
    return f"{'minus ' if minus else ''}{amount} {power}{name}{_per(each)}"


def _plural(name: str) -> str:
    """Of "square foot" square feet, of "kilometer per hour" kilometers per hour."""
    for before in ("square ", "kilowatt ", "milliampere "):
        if name.startswith(before):
            return before + _plural(name.removeprefix(before))
    first, space, rest = name.partition(" ")
    return _PLURALS.get(first, f"{first}s") + space + rest


def speak_feet(found: re.Match) -> str:
    """Of `FEET`: heights of people are "six foot two"."""
    return f"{words(found[1])} foot {words(found[2])}"
