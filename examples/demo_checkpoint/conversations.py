"""Conversations of recordings: the training data of the open-vocabulary voice.

Without context, a speaker's number selects a voice: 0 and 1 are the two main ones. After a turn of
a speaker, the speaker has the voice of that turn.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from plan import MAIN_VOICES
from speech_set import Utterance
from spoken_words import word_times
from texts import is_held_out_text
from tqdm import tqdm

from csm_jax.io.files import replace_file

# Shares of the kinds: a single turn; turns after a prompt in any voice; the rest are dialogues.
ALONE, PROMPTED = 0.35, 0.35
# The largest number of turns after a prompt, and of a dialogue.
FOLLOWING, TALKING = 3, 20


class Recordings:
    """The utterances that are not held out, by voice and by dialogue."""

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
        # A model would overfit to the recordings of a voice with only one.
        self.voices = [voice for voice, found in self.of_voice.items() if len(found) >= 2]


def draw_conversation(source: random.Random, recordings: Recordings, seconds: float) -> list[dict]:
    """Draws a training conversation of at most about `seconds` of speech."""
    kind = source.random()
    if kind < ALONE:
        number = source.randrange(len(MAIN_VOICES))
        return [_turn(number, source.choice(recordings.of_voice[MAIN_VOICES[number]]))]
    if kind < ALONE + PROMPTED:
        return _after_a_prompt(source, recordings, seconds)
    return _dialogue(source, recordings, seconds)


def _after_a_prompt(source: random.Random, recordings: Recordings, seconds: float) -> list[dict]:
    """Turns of any voice with either number; the first turn is context without a loss."""
    spoken = recordings.of_voice[source.choice(recordings.voices)]
    number = source.randrange(len(MAIN_VOICES))
    chosen = [source.choice(spoken) for _ in range(source.randint(2, 1 + FOLLOWING))]
    first, *others = _that_fit(chosen, seconds, fewest=2)
    return [_turn(number, first, train=False), *(_turn(number, each) for each in others)]


def _dialogue(source: random.Random, recordings: Recordings, seconds: float) -> list[dict]:
    """Turns of the main voices, each with its number; some are written dialogues, if any."""
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
    """The first utterances that fit into `seconds`, but at least `fewest`."""
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


def write_conversations(
    path: Path,
    utterances: Sequence[Utterance],
    *,
    count: int,
    seconds: float,
    seed: int,
    files: Mapping[Path, str] | None = None,
) -> None:
    """Writes conversations with the times of their words, where these are known.

    Args:
      seconds: of speech in a conversation, at most.
      files: what stands for each recording in `path`; None is its absolute path.
    """
    more = {
        str(each.audio.absolute()): _details(each, files)
        for each in tqdm(utterances, desc="word times", disable=None)
    }
    recordings = Recordings(utterances)
    source = random.Random(seed)
    lines = []
    for _ in range(count):
        turns = draw_conversation(source, recordings, seconds)
        lines.append(json.dumps([turn | more[turn["audio"]] for turn in turns]) + "\n")
    replace_file(path, "".join(lines).encode())


def _details(utterance: Utterance, files: Mapping[Path, str] | None) -> dict:
    """The fields of a turn that its utterance decides."""
    words = word_times(utterance)
    found = {} if words is None else {"words": words}
    return found if files is None else found | {"audio": files[utterance.audio]}
