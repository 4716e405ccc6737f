"""The words of English numbers, by num2words."""

import functools
from collections.abc import Callable

from csm_jax.errors import InputError

# num2words has names for numbers up to about this many digits; longer ones are read digit by digit.
_MAX_DIGITS = 15
# Names of parts; fractions with other denominators are not read as words.
_PARTS = {2: "half", 3: "third", 4: "quarter", 5: "fifth", 6: "sixth", 7: "seventh"}
_PARTS |= {8: "eighth", 9: "ninth", 10: "tenth"}


def num2words() -> Callable[..., str]:
    """The library's function; raises `InputError` if it is missing."""
    try:
        from num2words import num2words
    except ImportError as error:
        raise InputError(
            "num2words makes words of numbers, and is missing: pip install 'csm-jax[normalize]'"
        ) from error
    return num2words


@functools.lru_cache(4096)
def words(number: str | int, to: str = "cardinal") -> str:
    """A number of digits, commas and at most one point in words.

    Args:
      to: "cardinal", "ordinal" or "year".
    """
    text = str(number).replace(",", "")
    if len(text.partition(".")[0]) > _MAX_DIGITS:
        return digits(text)
    value = float(text) if "." in text else int(text)
    return num2words()(value, to=to).replace(",", "")


def digits(text: str) -> str:
    """The digits of a text, one by one."""
    return " ".join(words(digit) for digit in text if digit.isdecimal())


def decade(text: str) -> str:
    """Of "1990" the nineteen nineties."""
    ten = words(int(text), "year")
    return f"{ten[:-1]}ies" if ten.endswith("y") else f"{ten}s"


def fraction(whole: str | None, above: int, below: int) -> str | None:
    """Of (1, 1, 2) "one and a half", without `whole` "one half"; None if it has no usual name."""
    if below not in _PARTS or not 0 < above < below:
        return None
    name = _PARTS[below] if above == 1 else "halves" if below == 2 else f"{_PARTS[below]}s"
    if not whole:
        return f"{words(above)} {name}"
    return f"{words(whole)} and {'a' if above == 1 else words(above)} {name}"
