"""Arguments of callers, in any of Python's and numpy's forms, as plain numbers.

What is no number of the wanted kind is refused: a boolean or a fraction in place of a speaker would
make another prompt, without a word.
"""

import dataclasses
import operator
from typing import Any

from csm_jax.errors import InputError

_MAX_SHOWN = 40


def whole_number(value: Any, name: str) -> int:
    """An `int` of an integer in any form: of Python, numpy or jax, or a float such as 3.0.

    Raises `InputError`, which calls it `name`, for anything else, booleans included.
    """
    plain = _plain(value)
    if isinstance(plain, float):
        if plain.is_integer():
            return int(plain)
    elif not isinstance(plain, bool):
        try:
            return operator.index(plain)
        except TypeError:
            pass
    raise InputError(f"{name} is {_shown(value)}, but must be a whole number, such as 0")


def real_number(value: Any, name: str) -> float:
    """A `float` of a number in any form. Raises `InputError`, which calls it `name`, otherwise."""
    plain = _plain(value)
    if isinstance(plain, int | float) and not isinstance(plain, bool):
        try:
            return float(plain)
        except OverflowError:
            pass
    raise InputError(f"{name} is {_shown(value)}, but must be a number")


def truth_value(value: Any, name: str) -> bool:
    """A `bool` of Python, numpy or jax. Raises `InputError` otherwise: "false" would be true."""
    plain = _plain(value)
    if isinstance(plain, bool):
        return plain
    raise InputError(f"{name} is {_shown(value)}, but must be True or False")


def fill_defaults(instance: Any) -> None:
    """Gives the fields of a frozen dataclass that are None their defaults, where those are not."""
    for field in dataclasses.fields(instance):
        has_default = field.default is not dataclasses.MISSING and field.default is not None
        if has_default and getattr(instance, field.name) is None:
            object.__setattr__(instance, field.name, field.default)


def _plain(value: Any) -> Any:
    """A Python number of an array without axes or a scalar of numpy; any other value as it is."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
