"""Finds the alignment heads of the demo checkpoint, from recordings of flite with known times.

    apt install flite
    python examples/demo_checkpoint/align_heads.py --checkpoint=csm_jax/loading/demo

flite prints when each of its phonemes ends, so the words' starts are exact.
"""

from pathlib import Path

from absl import app, flags
from timed_speech import record

import csm_jax
from csm_jax.align.calibration import calibrate
from csm_jax.checkpoints import alignment_heads as heads

CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "a directory, which gets alignment.json")
COUNT = flags.DEFINE_integer("count", 80, "recordings")
SEED = flags.DEFINE_integer("seed", 0, "seed of the texts")


def main(_: list[str]) -> None:
    model = csm_jax.load(CHECKPOINT.value, dtype="float32")
    source = f"{COUNT.value} recordings of flite, seed {SEED.value}"
    found = calibrate(model, record(COUNT.value, SEED.value), source)
    print(heads.write(Path(CHECKPOINT.value), found), found)


if __name__ == "__main__":
    app.run(main)
