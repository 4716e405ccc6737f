"""Draws prompts for csm_jax.evaluate: digits and sentences, after the sample of a voice.

    python examples/demo_checkpoint/draw_prompts.py --out=prompts.lst
    python -m csm_jax.evaluate --checkpoint=demo --prompts=prompts.lst --out=run

Half of the texts are strings of 3 to 6 digits that are not in the training data, the others
sentences of its grammar. The two voices of the checkpoint take turns.
"""

import random
from pathlib import Path

from absl import app, flags
from texts import draw_digits, draw_sentence

from csm_jax.loading import BUNDLED

OUT = flags.DEFINE_string("out", None, "file to write")
COUNT = flags.DEFINE_integer("count", 100, "texts")
SEED = flags.DEFINE_integer("seed", 1, "seed of the texts")


def draw_prompts(count: int, seed: int) -> list[str]:
    """The lines of a file of prompts."""
    source = random.Random(f"prompts {seed}")
    samples = sorted((BUNDLED["demo"] / "prompts").glob("*.flac"))
    lines = []
    for i in range(count):
        # The kinds change after both voices, so that each voice has both.
        sample, is_sentence = samples[i % 2], i // 2 % 2
        transcript = sample.with_suffix(".txt").read_text().splitlines()[-1]
        text = draw_sentence(source) if is_sentence else draw_digits(source, 3, 6, held_out=True)
        name = f"{i:03}-{'sentence' if is_sentence else 'digits'}-{sample.stem}"
        lines.append(f"{name}|{transcript}|{sample}|{text}")
    return lines


def main(_: list[str]) -> None:
    Path(OUT.value).write_text(
        "".join(f"{line}\n" for line in draw_prompts(COUNT.value, SEED.value))
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    app.run(main)
