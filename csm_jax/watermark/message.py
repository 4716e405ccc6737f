"""Keys as the symbols of a mark, and back.

A key is five numbers of 8 bits. Each is four symbols of two bits, the highest first, as 1 to 4; a 0
ends the message. A symbol fills a frame, and the message repeats.
"""

from collections.abc import Sequence

import numpy as np

from csm_jax.errors import InputError

KEY_LENGTH = 5
# The key of Sesame's own code, which is public: its marks say "made with CSM", and not by whom.
PUBLIC_KEY = (212, 211, 146, 56, 201)
END = 0
_SHIFTS = np.array([6, 4, 2, 0])

Key = tuple[int, ...]


def check_key(key: Sequence[int]) -> Key:
    """The key as a tuple. Raises `InputError` if it is not five numbers from 0 to 255."""
    numbers = tuple(int(number) for number in key)
    if len(numbers) != KEY_LENGTH or not all(0 <= number <= 255 for number in numbers):
        shown = ",".join(str(number) for number in numbers)
        raise InputError(
            f"watermark key {shown}: it has {KEY_LENGTH} numbers from 0 to 255, such as "
            "212,211,146,56,201"
        )
    return numbers


def parse_key(text: str) -> Key:
    """The key that is written with commas. Raises `InputError` if it is none."""
    numbers = text.split(",")
    if not all(number.strip().isascii() and number.strip().isdecimal() for number in numbers):
        raise InputError(
            f"watermark_key is {text}: give five numbers from 0 to 255, such as 212,211,146,56,201"
        )
    return check_key([int(number) for number in numbers])


def to_symbols(key: Sequence[int]) -> np.ndarray:
    """The symbols of a key, int32 [21]."""
    bits = (np.array(check_key(key))[:, None] >> _SHIFTS) & 3
    return np.append(bits.ravel() + 1, END).astype(np.int32)


def from_symbols(symbols: np.ndarray) -> Key | None:
    """The key of one period of symbols [21] that can start anywhere in it; None if it is none."""
    ends = np.flatnonzero(symbols == END)
    if len(ends) != 1:
        return None
    pairs = np.roll(symbols, -ends[0] - 1)[:-1] - 1
    numbers = (pairs.reshape(KEY_LENGTH, len(_SHIFTS)) << _SHIFTS).sum(axis=1)
    return tuple(int(number) for number in numbers)
