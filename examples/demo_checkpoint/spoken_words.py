"""When the words of an utterance are spoken, from the durations of its phonemes."""

import difflib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from phonemes import LONG, SILENCE, SOUNDS, STRESS, phonemes_of
from speech_set import SAMPLE_RATE, UNIT, Utterance

from csm_jax.inference.alignment.words import word_spans

_VOWELS = frozenset("AIOWYaeioɐɑɒɔəɛɜɪʊuʌᵻæ")
# An alignment that costs more for each sound is of other words than those that are spoken.
_MOST_COST = 0.4
_MARKS = ".,!?;:"
# Of sounds of different kinds; as much as leaving out one and adding the other.
_OTHER_KIND = 2


def words_of(text: str) -> list[str]:
    return [text[start:end] for start, end in word_spans(text)]


def word_times(
    utterance: Utterance, pronounce: Callable[[str], str] | None = None
) -> list[dict[str, Any]] | None:
    """The words of an utterance's text as {"text", "start", "end"}, in seconds of its recording.

    espeak-ng may write several words as one and changes sounds between words. So the phonemes of
    each word alone are aligned with those that were spoken, by edit distance.

    Args:
      pronounce: the phonemes of a word alone; None asks espeak-ng.

    Returns:
      None if the times are not known: without a start, or without an alignment.
    """
    if utterance.start is None:
        return None
    written, spoken = words_of(utterance.text), words_of(utterance.spoken)
    owners = written_words(written, spoken)
    pronounced = [(pronounce or _pronounce)(word) for word in spoken]
    sounds = [
        (word, sound) for word, each in enumerate(pronounced) for sound in each if _is_sound(sound)
    ]
    heard = [index for index, symbol in enumerate(utterance.phonemes) if _is_sound(symbol)]
    pairs = align([utterance.phonemes[i] for i in heard], [sound for _, sound in sounds])
    if owners is None or pairs is None:
        return None
    symbols: dict[int, list[int]] = {}
    for index, sound in pairs:
        symbols.setdefault(owners[sounds[sound][0]], []).append(heard[index])
    return _timed(written, symbols, utterance)


def written_words(written: Sequence[str], spoken: Sequence[str]) -> list[int] | None:
    """The written word of each spoken word: "5:30" is spoken as two. None if it is not clear."""
    owners: list[int] = []
    simple = [[word.strip(_MARKS).lower() for word in words] for words in (written, spoken)]
    matcher = difflib.SequenceMatcher(None, *simple, autojunk=False)
    for _, first, end, spoken_first, spoken_end in matcher.get_opcodes():
        block = range(first, end)
        found = _owners(block, written[first:end], spoken[spoken_first:spoken_end])
        if found is None:
            return None
        owners += found
    return owners


def _owners(
    numbers: Sequence[int], written: Sequence[str], spoken: Sequence[str]
) -> list[int] | None:
    """The same for some of the words; `numbers` are those of the written ones."""
    if len(written) == len(spoken):
        return list(numbers)
    if len(written) == 1:
        return [numbers[0]] * len(spoken)
    # "May 5, 1984." is "May fifth, nineteen eighty-four.": marks are the same in both.
    cuts, spoken_cuts = _ends(written), _ends(spoken)
    if len(cuts) != len(spoken_cuts) or len(cuts) < 3:
        return None
    pieces = [
        _owners(numbers[a:b], written[a:b], spoken[c:d])
        for (a, b), (c, d) in zip(
            itertools.pairwise(cuts), itertools.pairwise(spoken_cuts), strict=True
        )
    ]
    known = [piece for piece in pieces if piece is not None]
    return list(itertools.chain(*known)) if len(known) == len(pieces) else None


def _ends(words: Sequence[str]) -> list[int]:
    """Where pieces end that punctuation ends, 0 and the end of all included."""
    inner = [i for i, word in enumerate(words, 1) if word[-1] in _MARKS and i < len(words)]
    return [0, *inner, len(words)]


def align(heard: Sequence[str], sounds: Sequence[str]) -> list[tuple[int, int]] | None:
    """Pairs of indices of the alignment with the least cost; None if it costs too much.

    Of sounds that are not paired, those before the first pair or after the last are in none; the
    others belong to the pair before them.
    """
    costs = [list(range(len(sounds) + 1))]
    for i, sound in enumerate(heard, 1):
        row = [i]
        for j, other in enumerate(sounds, 1):
            changed = costs[-1][j - 1] + _cost(sound, other)
            row.append(min(changed, costs[-1][j] + 1, row[-1] + 1))
        costs.append(row)
    if not sounds or costs[-1][-1] > _MOST_COST * len(sounds):
        return None
    pairs: list[tuple[int, int]] = []
    i, j = len(heard), len(sounds)
    while i and j:
        cost = _cost(heard[i - 1], sounds[j - 1])
        if cost < _OTHER_KIND and costs[i][j] == costs[i - 1][j - 1] + cost:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif costs[i][j] == costs[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def _cost(one: str, other: str) -> int:
    if one == other:
        return 0
    return 1 if (one in _VOWELS) == (other in _VOWELS) else _OTHER_KIND


def _timed(
    written: Sequence[str], symbols: dict[int, list[int]], utterance: Utterance
) -> list[dict[str, Any]]:
    """Words from their symbols; one without a symbol ends where it starts."""
    ends = list(itertools.accumulate(utterance.durations))  # ends[i]: where symbol i starts
    offset = utterance.start or 0

    def seconds(units: int) -> float:
        return round(max(0, units * UNIT - offset) / SAMPLE_RATE, 3)

    words, last = [], 0.0
    for number, text in enumerate(written):
        own = symbols.get(number)
        first = last if own is None else seconds(ends[_with_mark(utterance.phonemes, own[0])])
        last = last if own is None else seconds(ends[_with_length(utterance.phonemes, own[-1])])
        words.append({"text": text, "start": first, "end": last})
    return words


def _with_mark(phonemes: str, index: int) -> int:
    """The first symbol of a sound: a stress mark before it belongs to it."""
    return index - 1 if index and phonemes[index - 1] in STRESS else index


def _with_length(phonemes: str, index: int) -> int:
    """The symbol after a sound, whose length mark belongs to it."""
    return index + 2 if phonemes[index + 1 : index + 2] == LONG else index + 1


def _is_sound(symbol: str) -> bool:
    return symbol in SOUNDS and symbol != SILENCE


@functools.lru_cache(maxsize=100_000)
def _pronounce(word: str) -> str:
    return phonemes_of(word)
