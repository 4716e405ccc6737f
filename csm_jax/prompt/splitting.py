"""Splits texts before they are spoken, and bounds the length of their speech."""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable

from csm_jax.errors import InputError

# About 20 s of speech. The model was trained on turns of a conversation, and up to here a text is
# spoken exactly as the reference would.
MAX_CHARACTERS = 300

# For the longest that a text can take; `needed_seconds` has their sources.
PAUSE_SECONDS = 6.0
SECONDS_PER_LETTER = 0.25

# How many letters a character is spoken as, by Unicode category. Digits: "777" takes 25. Capitals:
# each letter of an acronym is a syllable or more. Lo, the letters of scripts without capitals
# (Chinese, Japanese, Korean, Arabic, Hindi), are a syllable or a word each.
_SPOKEN_LETTERS = {
    **dict.fromkeys(("Lu", "Lt", "Lo"), 4),
    **dict.fromkeys(("Nd", "Nl", "No", "Sm", "Sc", "Sk", "So"), 8),
    **dict.fromkeys(("Mn", "Mc", "Me", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co", "Cn"), 0),
}
# Punctuation to Unicode, but a word to a reader: percent, and, at.
_SPOKEN_PUNCTUATION = dict.fromkeys("%‰&@#*/\\§", 8)

_CLOSING = "[\"'”’»)\\]}」』）】〉》]*"  # noqa: RUF001
# Western marks end something only before a space: 3.14, 10:30 and 1,000 stay whole. No backtracking
# and no second start in a run of marks, for a page of dots would take minutes.
_SENTENCE_END = re.compile(
    rf"(?<![.!?…؟।])([.!?…؟।]++){_CLOSING}+\s+|[。！？｡]+{_CLOSING}\s*|\n\s*"  # noqa: RUF001
)
_CLAUSE_END = re.compile(
    rf"(?<![;:,—–،])[;:,—–،]++{_CLOSING}+\s+|[—、，；：]+{_CLOSING}\s*"  # noqa: RUF001
)
# Characters that more of the same text can make an end of a sentence.
_UNDECIDED = ".!?…؟।。！？｡\"'”’»)]}」』）】〉》"  # noqa: RUF001
_SPACE = re.compile(r"\s+")
# What a full stop after it does not end: initials, e.g. and U.S., numbers of a list, titles.
_ABBREVIATION = re.compile(
    r"\W*((?:[^\W\d_]\.)*[^\W\d_]|\d{1,2}|mr|mrs|ms|messrs|dr|prof|st|mt|jr|sr|rev|hon|gen|col|"
    r"capt|lt|sgt|vs|etc|cf|al|approx|dept|inc|ltd|co|corp|fig|vol|pp|ph\.d)",
    re.IGNORECASE,
)
_LONGEST_ABBREVIATION = 16


def needed_seconds(
    text: str,
    pause_seconds: float = PAUSE_SECONDS,
    seconds_per_letter: float = SECONDS_PER_LETTER,
) -> float:
    """The longest that speaking `text` can take, in seconds; what follows is not its speech.

    English conversation runs at 150 to 160 words a minute, about 14 letters a second, and slow
    speech at half of that. The bound is half of that once more, 4 letters a second, and 6 s for
    silence before, between and after. Digits, capitals, symbols and characters that are syllables
    count as several letters; white space and accents count as none.
    """
    return pause_seconds + seconds_per_letter * sum(map(_spoken_letters, text))


def split_text(text: str, max_characters: int = MAX_CHARACTERS) -> list[str]:
    """Splits a text of any length into parts that are spoken one after the other.

    A text that fits is one part. A longer one is split at ends of sentences; sentences that do not
    fit at ends of clauses; then at spaces; then anywhere, between a letter and its accents last.
    Parts take as much as fits, but the last two share evenly, so that no word is left alone.

    Returns:
      Stripped parts of 1 to `max_characters` characters, which together are the text but for white
      space: in a text that is split, a run of it becomes one space or line break. No parts for a
      text of white space.

    Raises:
      InputError: `max_characters` is less than 1.
    """
    if max_characters < 1:
        raise InputError(f"max_characters is {max_characters}, but must be at least 1")
    text = text.strip()
    if len(text) > max_characters:
        text = _SPACE.sub(lambda match: "\n" if "\n" in match[0] else " ", text)
    parts = _split(text, max_characters, _LEVELS)
    return [part.strip() for part in parts if part]


class Sentences:
    """Splits a text that arrives in pieces into sentences.

    Where a sentence ends is known once something follows: "No. 5" does not end after its dot.
    """

    def __init__(self):
        self._rest = ""
        # No sentence of the rest ends before this position.
        self._start = 0

    def __len__(self) -> int:
        """Characters of the sentence that has not ended yet."""
        return len(self._rest)

    def add(self, text: str) -> list[str]:
        """Returns the sentences that have ended with this piece of text."""
        text = self._rest + text
        *ended, rest = _sentences(text.strip(), self._start)
        self._rest = rest + " " * text[-1:].isspace()
        self._start = len(rest.rstrip(_UNDECIDED))
        return [part.strip() for part in ended if part.strip()]

    def take_rest(self) -> str:
        """Returns the sentence that has not ended, and starts again."""
        rest, self._rest, self._start = self._rest.strip(), "", 0
        return rest


def _spoken_letters(character: str) -> int:
    category = unicodedata.category(character)
    return _SPOKEN_PUNCTUATION.get(character, _SPOKEN_LETTERS.get(category, 1))


# Below, pieces keep the white space that follows them: joined, they are the text.


def _split(text: str, limit: int, levels: tuple[Callable[[str], list[str]], ...]) -> list[str]:
    if _length(text) <= limit:
        return [text]
    first, *rest = levels
    pieces = [part for piece in first(text) for part in _split(piece, limit, tuple(rest))]
    return ["".join(group) for group in _share_evenly(_pack(pieces, limit))]


def _pack(pieces: list[str], limit: int) -> list[list[str]]:
    """Groups of adjacent pieces, each as long as fits."""
    groups, packed = [[]], ""
    for piece in pieces:
        packed += piece
        if _length(packed) > limit:
            groups.append([])
            packed = piece
        groups[-1].append(piece)
    return groups


def _share_evenly(groups: list[list[str]]) -> list[list[str]]:
    """Moves the boundary between the last two groups to where the longer one is shortest."""
    if len(groups) < 2:
        return groups
    pieces = groups[-2] + groups[-1]
    shares = [(pieces[:i], pieces[i:]) for i in range(1, len(pieces))]
    best = min(shares, key=lambda share: max(_length("".join(half)) for half in share))
    return [*groups[:-2], *best]


def _length(part: str) -> int:
    return len(part.strip())


def _sentences(text: str, start: int = 0) -> list[str]:
    """Splits at ends of sentences, which are looked for from `start` on."""
    ends = (match for match in _SENTENCE_END.finditer(text, start) if _ends_sentence(match))
    return _cut(text, (match.end() for match in ends))


def _ends_sentence(match: re.Match[str]) -> bool:
    text, marks = match.string, match[1]
    if not marks or "\n" in match[0]:
        return True
    following = text[match.end()]  # there is one: the text is stripped
    if marks == ".":
        # An abbreviation is joined to its dot.
        before = text[max(0, match.start() - _LONGEST_ABBREVIATION) : match.start()]
        word = _SPACE.split(before)[-1]
        is_number = word.lower() == "no" and following.isdigit()
        return not (is_number or following == "." or _ABBREVIATION.fullmatch(word))
    # An ellipsis may stand within a sentence.
    return marks[-1] not in ".…" or not following.islower()


def _clauses(text: str) -> list[str]:
    return _cut(text, (match.end() for match in _CLAUSE_END.finditer(text)))


def _words(text: str) -> list[str]:
    return _cut(text, (match.end() for match in _SPACE.finditer(text)))


def _clusters(text: str) -> list[str]:
    """Letters with their accents, and emoji with what joiners tie to them."""
    joiner = "\u200d"
    return _cut(
        text,
        (
            i
            for i, character in enumerate(text)
            if not unicodedata.category(character).startswith("M")
            and joiner not in (character, text[i - 1])
        ),
    )


def _cut(text: str, ends: Iterable[int]) -> list[str]:
    bounds = [0, *(end for end in ends if 0 < end < len(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


_LEVELS = (_sentences, _clauses, _words, _clusters, list)
