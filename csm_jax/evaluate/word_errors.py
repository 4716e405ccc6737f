"""Word errors: how the words that were heard differ from those of the text."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WordErrors:
    """The differences of two lists of words.

    Attributes:
      words: of the reference.
      substitutions: words that were replaced by others.
      deletions: words that are missing.
      insertions: words that were added.
      repeated: those insertions that say again what stands beside them: the same word is found
        within as many places as there are insertions in a row.
    """

    words: int
    substitutions: int
    deletions: int
    insertions: int
    repeated: int

    @property
    def errors(self) -> int:
        """The edit distance of the two lists."""
        return self.substitutions + self.deletions + self.insertions


def count_errors(reference: Sequence[str], heard: Sequence[str]) -> WordErrors:
    """Counts the fewest edits that turn the reference into what was heard.

    Of several such alignments it takes one with the most equal words, so that a word that was left
    out before an added one does not count as two replaced words.
    """
    pairs = _align(reference, heard)
    inserted = [j for i, j in pairs if i is None and j is not None]
    return WordErrors(
        words=len(reference),
        substitutions=sum(
            i is not None and j is not None and reference[i] != heard[j] for i, j in pairs
        ),
        deletions=sum(j is None for _, j in pairs),
        insertions=len(inserted),
        repeated=sum(_count_repeated(run, heard) for run in _runs(inserted)),
    )


def _align(reference: Sequence[str], heard: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """Pairs of positions in the two lists; None stands for no word."""
    # The cost is a pair: edits, then words that are not equal to their partner.
    rows = [[(j, j) for j in range(len(heard) + 1)]]
    for i, word in enumerate(reference, 1):
        above, row = rows[-1], [(i, i)]
        for j, other in enumerate(heard, 1):
            edits, unequal = above[j - 1]
            pair = (edits, unequal) if word == other else (edits + 1, unequal + 2)
            row.append(min(pair, _one_more(above[j]), _one_more(row[j - 1])))
        rows.append(row)
    return _trace(rows, reference, heard)


def _one_more(cost: tuple[int, int]) -> tuple[int, int]:
    return cost[0] + 1, cost[1] + 1


def _trace(
    rows: list[list[tuple[int, int]]], reference: Sequence[str], heard: Sequence[str]
) -> list[tuple[int | None, int | None]]:
    """Walks back from the last words to the first."""
    i, j = len(reference), len(heard)
    pairs: list[tuple[int | None, int | None]] = []
    while i or j:
        if i and rows[i][j] == _one_more(rows[i - 1][j]):
            i -= 1
            pairs.append((i, None))
        elif j and rows[i][j] == _one_more(rows[i][j - 1]):
            j -= 1
            pairs.append((None, j))
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def _runs(positions: Sequence[int]) -> list[list[int]]:
    """Splits rising positions where one is left out."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return runs


def _count_repeated(run: Sequence[int], heard: Sequence[str]) -> int:
    def is_repeated(position: int) -> bool:
        first = max(0, position - len(run))
        beside = [*heard[first:position], *heard[position + 1 : position + 1 + len(run)]]
        return heard[position] in beside

    return sum(map(is_repeated, run))
