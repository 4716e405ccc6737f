"""Synthesises what the demo checkpoint learns from.

python examples/demo_checkpoint/synthesise.py --out=demo/speech
"""

import json
import random
from pathlib import Path

from absl import app, flags
from flite import THIRD_VOICE, VOICES, synthesise_all
from texts import draw_text

OUT = flags.DEFINE_string("out", "demo/speech", "directory for the recordings")
TEXTS = flags.DEFINE_integer("texts", 14_000, "to draw; both voices speak those that differ")
SEED = flags.DEFINE_integer("seed", 0, "of the texts")


def draw_conversation(source: random.Random, spoken: dict[str, list[dict]]) -> list[dict]:
    """Turns to learn from, of recordings `spoken` by each voice.

    A lone turn is in the speaker's own voice. Of two turns of one speaker the second is in the
    voice of the first, whichever that is: the context decides. Such a first turn is not learnt.
    """

    def say(voice: str, speaker: int, **more: object) -> dict:
        return {"speaker": speaker, **source.choice(spoken[voice]), **more}

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
    jobs = [
        (text, voice, out / voice / f"{i:05}.wav")
        for i, text in enumerate(texts)
        for voice in VOICES
    ]
    # The third voice speaks to the codec only.
    third = [(text, THIRD_VOICE, out / THIRD_VOICE / f"{i:05}.wav") for i, text in enumerate(texts)]
    synthesise_all(jobs + third[: len(texts) // 4])
    (out / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    spoken = {
        voice: [{"text": text, "audio": f"{voice}/{i:05}.wav"} for i, text in enumerate(texts)]
        for voice in VOICES
    }
    with (out / "train.jsonl").open("w") as file:
        for _ in range(3 * len(texts)):
            file.write(json.dumps(draw_conversation(source, spoken)) + "\n")


if __name__ == "__main__":
    app.run(main)
