"""Lengths that programs are compiled for: few shapes serve every length."""

from collections.abc import Iterator

from csm_jax.inference.config import InferenceConfig


def bucket(length: int, least: int = InferenceConfig.min_bucket) -> int:
    """The next power of two, and no less than `least`."""
    return max(least, 1 << (length - 1).bit_length())


def buckets(max_seq_len: int, least: int = InferenceConfig.min_bucket) -> Iterator[int]:
    """All lengths that `bucket` gives, up to `max_seq_len`."""
    length = 0
    while length < max_seq_len:
        length = min(bucket(length + 1, least), max_seq_len)
        yield length
