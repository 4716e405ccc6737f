"""Words in responses: when each is spoken."""

import dataclasses
from collections.abc import Sequence

from pydantic import BaseModel, Field

from csm_jax.inference.alignment.words import Word
from csm_jax.inference.request import Notice

NO_WORDS = Notice(
    "no_words",
    "the checkpoint has no alignment.json, so nothing tells when words are spoken: calibrate it",
)


class WordEntry(BaseModel):
    """A word as `csm_jax.inference.alignment.formats.word_rows` has it."""

    text: str
    start: float = Field(description="seconds")
    end: float = Field(description="seconds")
    confidence: float = Field(description="0 to 1; 0 if the word is not spoken")


def at_speed(words: Sequence[Word], speed: float) -> list[Word]:
    """The words of speech that is made faster or slower."""
    return [
        dataclasses.replace(word, start=word.start / speed, end=word.end / speed) for word in words
    ]
