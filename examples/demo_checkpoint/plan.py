"""The texts of the open-vocabulary voice, their voices and their order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dialogues import draw_dialogue
from spelling import TextForms
from texts import draw_digits

# By speaker number. The others give the codec and voice prompts more than two voices.
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
# Shares of the plan: book sentences, neighboring sentences, dialogues; the rest are digits.
SENTENCES, PARTS, DIALOGUES = 0.5, 0.2, 0.25


@dataclass(frozen=True)
class Job:
    """An utterance to synthesize.

    Attributes:
      id: its number in the plan, and the name of its recording.
      text: its text as written, the input of the model.
      spoken: the same in words, the input of the synthesizer.
      dialogue: the `id` of the dialogue's first turn; its own `id` for a single utterance.
    """

    id: int
    text: str
    spoken: str
    voice: str
    dialogue: int


def plan(count: int, sentences: Sequence[str], parts: Sequence[str], seed: int) -> list[Job]:
    """Plans at least `count` jobs. Every sentence and part is used at most once."""
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


def _draw_turns(source: random.Random, books: dict[str, list[str]]) -> list[TextForms]:
    kind = source.random()
    if kind < SENTENCES and books["sentence"]:
        text = books["sentence"].pop()
        return [TextForms(text, text)]
    if kind < SENTENCES + PARTS and books["part"]:
        text = books["part"].pop()
        return [TextForms(text, text)]
    if kind < SENTENCES + PARTS + DIALOGUES:
        return draw_dialogue(source)
    # espeak-ng converts numerals to words.
    text = draw_digits(source, 3, 10, held_out=False)
    return [TextForms(text, text)]


def _draw_voices(source: random.Random) -> list[str]:
    """Two voices that alternate."""
    pool = OTHER_VOICES if source.random() < OTHERS_SHARE else MAIN_VOICES
    return source.sample(pool, 2)
