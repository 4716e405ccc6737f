"""Texts of the demo checkpoint: digits, numbers, times, and sentences of a small grammar.

Every text is drawn from a seed. Strings of digits with `is_held_out` are not in the training data.
"""

import random
import re
import zlib

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = [
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

ENDINGS = [".", "?", "!"]

# A sentence is a template; a word in capitals is replaced by an entry of its list.
GRAMMAR = {
    "SENTENCE": [
        "hello, my name is NAME",
        "hello NAME, how are you TODAY",
        "good PARTOFDAY NAME",
        "good PARTOFDAY, how can i help you",
        "thank you very much, NAME",
        "i am fine, thank you",
        "the COLOUR ANIMAL is in the PLACE",
        "there are NUMBER COLOUR THINGS on the table",
        "i would like NUMBER THINGS, please",
        "the train to CITY leaves at TIME",
        "we will meet at TIME on DAY",
        "NAME lives in CITY",
        "it is WEATHER in CITY TODAY",
        "it was WEATHER on DAY",
        "it is TIME now",
        "please call me on DAY PARTOFDAY",
        "where is the COLOUR THING",
        "i can see a COLOUR ANIMAL",
        "NAME and NAME went to the PLACE",
        "this is a small model, and it can speak",
        "the number is DIGIT DIGIT DIGIT",
    ],
    "NAME": ["anna", "peter", "maria", "john", "lucy", "david", "emma", "tom"],
    "TODAY": ["today", "this PARTOFDAY"],
    "PARTOFDAY": ["morning", "evening", "afternoon"],
    "COLOUR": ["red", "green", "blue", "white", "black", "yellow"],
    "ANIMAL": ["cat", "dog", "bird", "horse", "fish"],
    "PLACE": ["house", "garden", "kitchen", "park", "school"],
    "CITY": ["london", "paris", "berlin", "rome", "boston"],
    "THING": ["book", "cup", "apple", "car", "box"],
    "THINGS": ["books", "cups", "apples", "cars", "boxes"],
    "WEATHER": ["raining", "sunny", "cold", "warm", "windy"],
    "DAY": ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"],
    "NUMBER": DIGITS[2:] + TEENS,
    "DIGIT": DIGITS,
    "TIME": ["HOUR o'clock", "half past HOUR", "ten past HOUR", "quarter to HOUR"],
    "HOUR": DIGITS[1:] + TEENS[:3],
}


def draw_text(source: random.Random) -> str:
    """Draws a training text: digits in half of the cases."""
    kind = source.random()
    if kind < 0.5:
        return draw_digits(source, 1, 8, held_out=False)
    if kind < 0.6:
        return draw_number(source)
    return draw_sentence(source)


def draw_ending(source: random.Random) -> str:
    """Draws the end of a text: nothing in half of the cases. The voices speak all of them alike."""
    return source.choice(["", "", "", *ENDINGS])


def draw_digits(source: random.Random, fewest: int, most: int, held_out: bool) -> str:
    """Draws digits as words, held out or not; one in six of the others are numerals."""
    while True:
        words = [source.choice(DIGITS) for _ in range(source.randint(fewest, most))]
        if is_held_out(words) == held_out:
            break
    if not held_out and source.random() < 1 / 6:
        return " ".join(str(DIGITS.index(word)) for word in words)
    return " ".join(words)


def is_held_out(words: list[str]) -> bool:
    """Whether a string of digits is held out: a tenth of those of three digits and more."""
    return len(words) > 2 and zlib.crc32(" ".join(words).encode()) % 10 == 0


def is_held_out_text(text: str) -> bool:
    """Whether a text is held out for evaluation: one of 64."""
    return zlib.crc32(text.encode()) % 64 == 0


def draw_number(source: random.Random) -> str:
    """A whole number from 10 to 9999, spelled out."""
    digits = source.randint(2, 4)
    return spell(source.randrange(10 ** (digits - 1), 10**digits))


def spell(number: int) -> str:
    """A whole number from 0 to 9999 in words."""
    if number < 10:
        return DIGITS[number]
    if number < 20:
        return TEENS[number - 10]
    if number < 100:
        return _join(TENS[number // 10 - 2], number % 10)
    if number < 1000:
        return _join(f"{DIGITS[number // 100]} hundred", number % 100)
    return _join(f"{DIGITS[number // 1000]} thousand", number % 1000)


def draw_sentence(source: random.Random) -> str:
    """A sentence of the grammar."""
    text = "SENTENCE"
    while match := re.search(r"[A-Z]{3,}", text):
        text = text[: match.start()] + source.choice(GRAMMAR[match[0]]) + text[match.end() :]
    return text


def _join(words: str, rest: int) -> str:
    return f"{words} {spell(rest)}" if rest else words
