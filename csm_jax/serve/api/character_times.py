"""When each character of a text is spoken, while the words of the speech become known.

Times are in seconds. A character of a word has its share of the word's time, and what stands
between two words, such as a space, a share of the gap between them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from csm_jax.inference.alignment.words import Word

# Words of two forms of a text that differ are paired within so many words.
_REACH = 24
_WORD = re.compile(r"\S+")


# ElevenLabs' form of the characters of a text; None if there are none.
Alignment = dict[str, list] | None
Alignments = dict[str, Alignment]


class Timed(NamedTuple):
    """Characters of a text, from place `first` to before `last`, and when they are spoken."""

    first: int
    last: int
    start: float
    end: float


class CharacterTimes:
    """The times of a text's characters, in order and without overlaps.

    Attributes:
      starts, ends: of the characters so far.
    """

    def __init__(self, text: str):
        self._text = text
        self.starts: list[float] = []
        self.ends: list[float] = []
        self._num_taken = 0

    def add(self, timed: Sequence[Timed]) -> None:
        """Adds words, in the order of the text."""
        for word in timed:
            start = max(word.start, self._end)
            self._spread(word.first, self._end, start)
            self._spread(word.last, start, max(word.end, start))

    def finish(self) -> None:
        """Adds the characters that are not spoken any more, where the speech has ended."""
        self._spread(len(self._text), self._end, self._end)

    def take(self) -> Alignment:
        """The characters since the last call."""
        new = slice(self._num_taken, len(self.starts))
        self._num_taken = len(self.starts)
        if new.start == new.stop:
            return None
        return {
            "characters": list(self._text[new]),
            "character_start_times_seconds": [round(each, 3) for each in self.starts[new]],
            "character_end_times_seconds": [round(each, 3) for each in self.ends[new]],
        }

    @property
    def _end(self) -> float:
        return self.ends[-1] if self.ends else 0.0

    def _spread(self, last: int, start: float, end: float) -> None:
        """Divides a time among the next characters, up to place `last`."""
        count = last - len(self.starts)
        if count > 0:
            edges = [start + (end - start) * i / count for i in range(count)] + [end]
            self.starts += edges[:-1]
            self.ends += edges[1:]


class WordPlaces:
    """Finds the words of a speech in its text, one after another.

    White space is not compared: a run of it can have become one space in the words.
    """

    def __init__(self, text: str):
        self._places = [i for i, character in enumerate(text) if not character.isspace()]
        self._letters = "".join(text[i] for i in self._places)
        self._next = 0

    def find(self, words: Sequence[Word]) -> Iterator[Timed]:
        """The next words with their places; those that are not in the text are left out."""
        for word in words:
            letters = "".join(word.text.split())
            first = self._letters.find(letters, self._next)
            if letters and first >= 0:
                self._next = first + len(letters)
                last = self._places[self._next - 1] + 1
                yield Timed(self._places[first], last, word.start, word.end)


class TextTimes:
    """The times of a text as it is spoken and as it was written, which can be different texts."""

    def __init__(self, written: str, spoken: str):
        self._places = WordPlaces(spoken)
        self._spoken = CharacterTimes(spoken)
        self._written = CharacterTimes(written) if written != spoken else None
        self._pairs = pair_words(written, spoken) if self._written else iter(())
        self._next_pair = next(self._pairs, None)

    def add(self, words: Sequence[Word], is_over: bool) -> None:
        """Adds the next words. `is_over`: no more come."""
        self._spoken.add(list(self._places.find(words)))
        if is_over:
            self._spoken.finish()
        if self._written is not None:
            self._written.add(list(self._paired()))
            if is_over:
                self._written.finish()

    def take(self) -> Alignments:
        """The fields of ElevenLabs' responses, with the characters since the last call."""
        spoken = self._spoken.take()
        written = spoken if self._written is None else self._written.take()
        return {"alignment": written, "normalized_alignment": spoken}

    def _paired(self) -> Iterator[Timed]:
        """The written words whose spoken ones have times by now."""
        starts, ends = self._spoken.starts, self._spoken.ends
        while (pair := self._next_pair) and pair.spoken_last <= len(starts):
            start, end = starts[pair.spoken_first], ends[pair.spoken_last - 1]
            yield Timed(pair.written_first, pair.written_last, start, end)
            self._next_pair = next(self._pairs, None)


class Pair(NamedTuple):
    """Places in two forms of a text that stand for each other."""

    written_first: int
    written_last: int
    spoken_first: int
    spoken_last: int


def pair_words(written: str, spoken: str) -> Iterator[Pair]:
    """Pairs equal words of two forms of a text, and what differs between them.

    What only one of them has is in no pair. The time is linear in the length of the texts.
    """
    ours = [word.span() for word in _WORD.finditer(written)]
    theirs = [word.span() for word in _WORD.finditer(spoken)]
    i = j = 0
    while i < len(ours) and j < len(theirs):
        left = [written[slice(*span)] for span in ours[i : i + _REACH]]
        right = [spoken[slice(*span)] for span in theirs[j : j + _REACH]]
        m, n = _until_equal(left, right)
        if (m, n) == (0, 0):
            m = n = 1
        if m and n:
            yield Pair(ours[i][0], ours[i + m - 1][1], theirs[j][0], theirs[j + n - 1][1])
        i, j = i + m, j + n


def _until_equal(left: Sequence[str], right: Sequence[str]) -> tuple[int, int]:
    """How many words stand before the nearest equal ones; all, if no words are equal."""
    for total in range(len(left) + len(right) - 1):
        for m in range(max(0, total - len(right) + 1), min(total, len(left) - 1) + 1):
            if left[m] == right[total - m]:
                return m, total - m
    return len(left), len(right)
