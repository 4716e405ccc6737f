"""Synthesizes the training data of the demo checkpoint.

python examples/demo_checkpoint/synthesize.py --out=demo/speech
"""

import json
import random
from pathlib import Path

from absl import app, flags
from flite import THIRD_VOICE, VOICES, synthesize_all
from texts import draw_ending, draw_text

OUT = flags.DEFINE_string("out", "demo/speech", "directory for the recordings")
TEXTS = flags.DEFINE_integer("texts", 40_000, "texts to draw; duplicates are dropped")
CONVERSATIONS = flags.DEFINE_integer("conversations", 170_000, "training conversations")
SEED = flags.DEFINE_integer("seed", 0, "seed of the texts")


def recordings(voice: str, texts: list[str]) -> list[dict]:
    """The texts of a voice with their files, as fields of a turn."""
    return [{"text": text, "audio": f"{voice}/{i:05}.wav"} for i, text in enumerate(texts)]


def draw_conversation(source: random.Random, spoken: dict[str, list[dict]]) -> list[dict]:
    """Draws a training conversation of recordings `spoken` by each voice.

    A single turn has the speaker's own voice. The second of two turns has the voice of the first,
    which may be either: the context decides. Such a first turn is context without a loss.
    """

    def draw_turn(voice: str, speaker: int, **more: object) -> dict:
        recording = source.choice(spoken[voice])
        text = recording["text"] + draw_ending(source)
        return {"speaker": speaker, "text": text, "audio": recording["audio"], **more}

    kind, voice = source.random(), source.choice(VOICES)
    own = VOICES.index(voice)
    if kind < 0.4:
        return [draw_turn(voice, own)]
    if kind < 0.85:
        speaker = source.randrange(len(VOICES))
        return [draw_turn(voice, speaker, train=False), draw_turn(voice, speaker)]
    other = VOICES[1 - own]
    return [draw_turn(voice, own), draw_turn(other, 1 - own)]


def main(_: list[str]) -> None:
    source = random.Random(SEED.value)
    out = Path(OUT.value)
    texts = list(dict.fromkeys(draw_text(source) for _ in range(TEXTS.value)))
    # The third voice is for the codec only.
    texts_of = dict.fromkeys(VOICES, texts) | {THIRD_VOICE: texts[: len(texts) // 8]}
    spoken = {voice: recordings(voice, drawn) for voice, drawn in texts_of.items()}
    synthesize_all(
        [(each["text"], voice, out / each["audio"]) for voice in spoken for each in spoken[voice]]
    )
    (out / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    with (out / "train.jsonl").open("w") as file:
        for _ in range(CONVERSATIONS.value):
            file.write(json.dumps(draw_conversation(source, spoken)) + "\n")


if __name__ == "__main__":
    app.run(main)
