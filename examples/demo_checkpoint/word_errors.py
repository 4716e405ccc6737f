"""Counting of word errors."""


def count_errors(said: list[str], heard: list[str]) -> int:
    """The number of inserted, deleted and replaced words: the edit distance of two lists."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]
