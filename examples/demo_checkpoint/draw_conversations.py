"""Writes conversations of recordings, with the times of their words, for csm_jax.finetune.

    python examples/demo_checkpoint/draw_conversations.py --speech=voice/speech \
        --out=voice/train.jsonl --count=100000
"""

from pathlib import Path

from absl import app, flags
from conversations import write_conversations
from speech_set import read_manifests

SPEECH = flags.DEFINE_multi_string("speech", None, "a directory of speech; may be repeated")
OUT = flags.DEFINE_string("out", "voice/train.jsonl", "file to write")
COUNT = flags.DEFINE_integer("count", 100_000, "conversations")
SECONDS = flags.DEFINE_float("seconds", 75.0, "longest conversation in seconds of speech")
SEED = flags.DEFINE_integer("seed", 0, "seed of the conversations")


def main(_: list[str]) -> None:
    write_conversations(
        Path(OUT.value),
        read_manifests(map(Path, SPEECH.value)),
        count=COUNT.value,
        seconds=SECONDS.value,
        seed=SEED.value,
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("speech")
    app.run(main)
