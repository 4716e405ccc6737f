"""The words of a text, and which rows of a prompt stand for them.

Axes: L text rows of a prompt, W words.
"""

import dataclasses
import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.prompt.tokenizer import Tokenizer
from csm_jax.prompt.turns import tagged_text

_CHUNK = re.compile(r"\S+")
# Scripts without spaces, in which a letter is a syllable or a word.
_LETTERS_ALONE = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U000323af]"
)
# Kinds of characters that are spoken: letters, numbers and symbols. Marks belong to letters.
_SPOKEN = "LNS"
# Punctuation that is read out as a word.
_SPOKEN_PUNCTUATION = frozenset("%‰&@#*/\\§")


@dataclass(frozen=True)
class Word:
    """A word of a text, and when it is spoken.

    Attributes:
      text: as it is written, with its punctuation.
      start, end: seconds from the beginning of the speech. Of a word that is not spoken both are
        where it is missing.
      confidence: how much of the attention lay on the word while it was spoken, 0 to 1.
      spoken: whether it is spoken at all.
    """

    text: str
    start: float
    end: float
    confidence: float
    spoken: bool = True

    def moved(self, seconds: float) -> "Word":
        """The same word so much later."""
        return dataclasses.replace(self, start=self.start + seconds, end=self.end + seconds)


def word_spans(text: str) -> list[tuple[int, int]]:
    """The words of a text as (start, end) of their characters.

    Words end at white space; letters of scripts without spaces are words of their own. Punctuation
    belongs to the word before it, and at the beginning to the first.
    """
    spans: list[tuple[int, int]] = []
    opening = None  # where punctuation before the first word begins
    for start, end in _pieces(text):
        if _is_spoken(text[start:end]):
            spans.append((start if opening is None else opening, end))
            opening = None
        elif spans:
            spans[-1] = spans[-1][0], end
        elif opening is None:
            opening = start
    # A text of punctuation alone is one word.
    return spans if opening is None else [(opening, len(text.rstrip()))]


def row_weights(text: str, speaker: int, tokenizer: Tokenizer, config: CSMConfig) -> np.ndarray:
    """How much of each text row's attention belongs to each word: float32 [L, W].

    A token that spans several words belongs to them in proportion to its characters. The rows of
    BOS, EOS and the speaker belong to none.
    """
    spans = word_spans(text)
    tagged = tagged_text(text, speaker, config)
    tokens = np.array([token[1:] for token in tokenizer.encode_with_offsets(tagged)])  # [L, 2]
    words = np.array(spans).reshape(-1, 2) + len(tagged) - len(text)  # [W, 2]
    shared = np.minimum(tokens[:, 1:], words[:, 1]) - np.maximum(tokens[:, :1], words[:, 0])
    weights = np.maximum(shared, 0).astype(np.float32)
    totals = weights.sum(axis=1, keepdims=True)
    return weights / np.maximum(totals, 1)


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Runs without white space, cut around the letters that are words of their own."""
    for chunk in _CHUNK.finditer(text):
        cuts = {chunk.start(), chunk.end()}
        for letter in _LETTERS_ALONE.finditer(text, *chunk.span()):
            cuts |= {letter.start(), _end_of_cluster(text, letter.end())}
        yield from itertools.pairwise(sorted(cuts))


def _end_of_cluster(text: str, end: int) -> int:
    """Where the marks end that follow a letter."""
    while end < len(text) and unicodedata.category(text[end]).startswith("M"):
        end += 1
    return end


def _is_spoken(piece: str) -> bool:
    return any(
        unicodedata.category(character)[0] in _SPOKEN or character in _SPOKEN_PUNCTUATION
        for character in piece
    )
