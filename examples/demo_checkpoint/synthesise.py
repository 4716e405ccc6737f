"""Synthesises what the demo checkpoint learns from.

python examples/demo_checkpoint/synthesise.py --out=demo/speech
"""

import json
import random
from pathlib import Path

from absl import app, flags
from flite import THIRD_VOICE, VOICES, synthesise_all
from texts import draw_ending, draw_text

OUT = flags.DEFINE_string("out", "demo/speech", "directory for the recordings")
TEXTS = flags.DEFINE_integer("texts", 40_000, "to draw; both voices speak those that differ")
CONVERSATIONS = flags.DEFINE_integer("conversations", 170_000, "of these recordings, to learn from")
SEED = flags.DEFINE_integer("seed", 0, "of the texts")


def recordings(voice: str, texts: list[str]) -> list[dict]:
    """What a voice says, and the file of each, as a turn of a conversation has them."""
    return [{"text": text, "audio": f"{voice}/{i:05}.wav"} for i, text in enumerate(texts)]


def draw_conversation(source: random.Random, spoken: dict[str, list[dict]]) -> list[dict]:
    """Turns to learn from, of recordings `spoken` by each voice.

    A lone turn is in the speaker's own voice. Of two turns of one speaker the second is in the
    voice of the first, whichever that is: the context decides. Such a first turn is not learnt.
    """

    def say(voice: str, speaker: int, **more: object) -> dict:
        said = source.choice(spoken[voice])
        text = said["text"] + draw_ending(source)
        return {"speaker": speaker, "text": text, "audio": said["audio"], **more}

    kind, voice = source.random(), source.choice(VOICES)
    own = VOICES.index(voice)
    if kind < 0.4:
        return [say(voice, own)]
    if kind < 0.85:
        speaker = source.randrange(len(VOICES))
        return [say(voice, speaker, train=False), say(voice, speaker)]
    other = VOICES[1 - own]
    return [say(voice, own), say(other, 1 - own)]


def main(_: list[str]) -> None:
    source = random.Random(SEED.value)
    out = Path(OUT.value)
    texts = list(dict.fromkeys(draw_text(source) for _ in range(TEXTS.value)))
    # The third voice speaks to the codec only.
    texts_of = dict.fromkeys(VOICES, texts) | {THIRD_VOICE: texts[: len(texts) // 8]}
    spoken = {voice: recordings(voice, said) for voice, said in texts_of.items()}
    synthesise_all(
        [(each["text"], voice, out / each["audio"]) for voice in spoken for each in spoken[voice]]
    )
    (out / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    with (out / "train.jsonl").open("w") as file:
        for _ in range(CONVERSATIONS.value):
            file.write(json.dumps(draw_conversation(source, spoken)) + "\n")


if __name__ == "__main__":
    app.run(main)
