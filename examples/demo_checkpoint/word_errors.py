"""Counting of word errors."""


def count_errors(reference: list[str], hypothesis: list[str]) -> int:
    """The number of inserted, deleted and replaced words: the edit distance of the two lists."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(hypothesis, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]
