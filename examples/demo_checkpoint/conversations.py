"""Conversations of recordings, which the model of the open-vocabulary voice learns from.

The voices teach two things. A speaker's number means a voice: 0 and 1 are the two main ones. After
a turn of a speaker it is the voice of that turn, whichever that is.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from plan import MAIN_VOICES
from speech_set import Utterance
from texts import is_held_out_text

# Shares of the kinds: a lone turn; turns after a prompt in any voice; the rest two who talk.
ALONE, PROMPTED = 0.35, 0.35
# Turns at most that follow a prompt, and of two who talk.
FOLLOWING, TALKING = 3, 20


class Recordings:
    """What may be drawn: utterances that are not held out, by voice and by dialogue."""

    def __init__(self, utterances: Iterable[Utterance]):
        self.of_voice: dict[str, list[Utterance]] = defaultdict(list)
        dialogues: dict[tuple[Path, int], list[Utterance]] = defaultdict(list)
        for each in utterances:
            if is_held_out_text(each.text):
                continue
            self.of_voice[each.voice].append(each)
            if each.dialogue is not None:
                dialogues[each.audio.parent.parent, each.dialogue].append(each)
        self.dialogues = [
            turns
            for turns in dialogues.values()
            if len(turns) > 1 and {turn.voice for turn in turns} <= set(MAIN_VOICES)
        ]
        # With a voice of few recordings a model would learn these by heart.
        self.voices = [voice for voice, found in self.of_voice.items() if len(found) >= 2]


def draw_conversation(source: random.Random, recordings: Recordings, seconds: float) -> list[dict]:
    """Turns to learn from, of at most about so many seconds."""
    kind = source.random()
    if kind < ALONE:
        number = source.randrange(len(MAIN_VOICES))
        return [_turn(number, source.choice(recordings.of_voice[MAIN_VOICES[number]]))]
    if kind < ALONE + PROMPTED:
        return _after_a_prompt(source, recordings, seconds)
    return _two_who_talk(source, recordings, seconds)


def _after_a_prompt(source: random.Random, recordings: Recordings, seconds: float) -> list[dict]:
    """Any voice under either number; the first turn is heard but not learnt."""
    spoken = recordings.of_voice[source.choice(recordings.voices)]
    number = source.randrange(len(MAIN_VOICES))
    chosen = [source.choice(spoken) for _ in range(source.randint(2, 1 + FOLLOWING))]
    first, *others = _that_fit(chosen, seconds, fewest=2)
    return [_turn(number, first, train=False), *(_turn(number, each) for each in others)]


def _two_who_talk(source: random.Random, recordings: Recordings, seconds: float) -> list[dict]:
    """The main voices, each under its number, in dialogues where there are some."""
    chosen: list[Utterance] = []
    voice = source.randrange(2)
    while len(chosen) < source.randint(2, TALKING):
        if recordings.dialogues and source.random() < 0.5:
            chosen += source.choice(recordings.dialogues)
            voice = 1 - MAIN_VOICES.index(chosen[-1].voice)
        else:
            chosen.append(source.choice(recordings.of_voice[MAIN_VOICES[voice]]))
            voice = 1 - voice
    fitting = _that_fit(chosen, seconds, fewest=1)
    return [_turn(MAIN_VOICES.index(each.voice), each) for each in fitting]


def _that_fit(chosen: Sequence[Utterance], seconds: float, fewest: int) -> list[Utterance]:
    """The first ones, as many as there is room for."""
    fitting: list[Utterance] = []
    left = seconds
    for each in chosen:
        left -= each.seconds
        if left < 0 and len(fitting) >= fewest:
            break
        fitting.append(each)
    return fitting


def _turn(speaker: int, utterance: Utterance, **more: bool) -> dict:
    audio = str(utterance.audio.absolute())
    return {"speaker": speaker, "text": utterance.text, "audio": audio, **more}
