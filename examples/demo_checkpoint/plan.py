"""What is to be spoken for the open-vocabulary voice, by whom, and in which order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dialogues import draw_dialogue
from spelling import Said
from texts import draw_digits

# By speaker number. Others are for breadth: a codec, and voice prompts, that know more than two.
MAIN_VOICES = ("af_heart", "am_michael")
OTHER_VOICES = (
    "af_bella",
    "af_nicole",
    "af_sarah",
    "af_sky",
    "af_nova",
    "af_kore",
    "am_adam",
    "am_fenrir",
    "am_puck",
    "am_onyx",
    "am_liam",
    "bf_emma",
    "bf_isabella",
    "bf_alice",
    "bm_george",
    "bm_lewis",
    "bm_fable",
    "bm_daniel",
)
OTHERS_SHARE = 0.1
# Shares of what is planned: sentences of books, neighbouring sentences, dialogues; the rest digits.
SENTENCES, PARTS, DIALOGUES = 0.5, 0.2, 0.25


@dataclass(frozen=True)
class Job:
    """An utterance to be.

    Attributes:
      id: its number in the plan, and the name of its recording.
      text: as it is written, which is what a model reads.
      spoken: the same in words, which is what the synthesizer reads.
      dialogue: the `id` of the dialogue's first turn; of a lone utterance its own.
    """

    id: int
    text: str
    spoken: str
    voice: str
    dialogue: int


def plan(count: int, sentences: Sequence[str], parts: Sequence[str], seed: int) -> list[Job]:
    """At least `count` jobs. No sentence or part comes twice, until there are no more of them."""
    source = random.Random(seed)
    books = {"sentence": _shuffled(sentences, source), "part": _shuffled(parts, source)}
    jobs: list[Job] = []
    while len(jobs) < count:
        turns = _draw_turns(source, books)
        first = len(jobs)
        voices = _draw_voices(source)
        for i, turn in enumerate(turns):
            jobs.append(Job(first + i, turn.written, turn.spoken, voices[i % 2], first))
    return jobs


def _shuffled(texts: Sequence[str], source: random.Random) -> list[str]:
    unique = sorted(set(texts))
    source.shuffle(unique)
    return unique


def _draw_turns(source: random.Random, books: dict[str, list[str]]) -> list[Said]:
    kind = source.random()
    if kind < SENTENCES and books["sentence"]:
        text = books["sentence"].pop()
        return [Said(text, text)]
    if kind < SENTENCES + PARTS and books["part"]:
        text = books["part"].pop()
        return [Said(text, text)]
    if kind < SENTENCES + PARTS + DIALOGUES:
        return draw_dialogue(source)
    # Numerals are heard as the words that espeak-ng makes of each.
    text = draw_digits(source, 3, 10, held_out=False)
    return [Said(text, text)]


def _draw_voices(source: random.Random) -> list[str]:
    """Two voices, that take turns."""
    pool = OTHER_VOICES if source.random() < OTHERS_SHARE else MAIN_VOICES
    return source.sample(pool, 2)
