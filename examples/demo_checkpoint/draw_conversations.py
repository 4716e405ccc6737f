"""Writes a manifest of conversations of recordings for csm_jax.finetune.

    python examples/demo_checkpoint/draw_conversations.py --speech=voice/speech \
        --out=voice/train.jsonl --count=100000
"""

import json
import random
from pathlib import Path

from absl import app, flags
from conversations import Recordings, draw_conversation
from speech_set import read_manifests

SPEECH = flags.DEFINE_multi_string("speech", None, "a directory of speech; may be repeated")
OUT = flags.DEFINE_string("out", "voice/train.jsonl", "file to write")
COUNT = flags.DEFINE_integer("count", 100_000, "conversations")
SECONDS = flags.DEFINE_float("seconds", 75.0, "longest conversation in seconds of speech")
SEED = flags.DEFINE_integer("seed", 0, "seed of the conversations")


def main(_: list[str]) -> None:
    recordings = Recordings(read_manifests(map(Path, SPEECH.value)))
    source = random.Random(SEED.value)
    with open(OUT.value, "w") as file:
        for _ in range(COUNT.value):
            turns = draw_conversation(source, recordings, SECONDS.value)
            file.write(json.dumps(turns) + "\n")


if __name__ == "__main__":
    flags.mark_flag_as_required("speech")
    app.run(main)
