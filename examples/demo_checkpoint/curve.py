"""Prints the word error rate against training time, from the checkpoints of a run.

    python examples/demo_checkpoint/curve.py --run=demo/run --base=demo/untrained

A line is a checkpoint: its step, the minutes since the start of the run, and the rate over
--strings strings.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import app, flags, logging
from judge import draw_requests, speak, word_error_rate

from csm_jax.inference.generator import Generator
from csm_jax.model.precision import FLOAT32
from csm_jax.train.pretrained import PretrainedModel, load_pretrained

RUN = flags.DEFINE_string("run", "demo/run", "directory of csm_jax.finetune")
BASE = flags.DEFINE_string("base", "demo/untrained", "checkpoint that the run started from")
STRINGS = flags.DEFINE_integer("strings", 40, "of 3 to 6 digits")


def read_average(checkpoint: Path) -> dict[str, Any]:
    """The moving average of the parameters in a checkpoint of a run."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((checkpoint / "state").absolute())["ema"]


def rate(base: PretrainedModel, params: dict[str, Any]) -> float:
    params = jax.tree.map(jnp.asarray, {"csm": params, "codec": base.codec_params})
    model = Generator.from_params(base.config, params, base.tokenizer, FLOAT32)
    return word_error_rate(speak(model, draw_requests(STRINGS.value, seed=1), batch=16))


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    run = Path(RUN.value)
    start = (run / "run.json").stat().st_mtime
    base = load_pretrained(BASE.value, FLOAT32, None)
    kept = sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    print(f"{'step':>6}{'minutes':>9}{'word error rate':>17}")
    for checkpoint in kept:
        minutes = (checkpoint.stat().st_mtime - start) / 60
        errors = rate(base, read_average(checkpoint))
        print(f"{checkpoint.name:>6}{minutes:9.1f}{errors:17.3f}", flush=True)


if __name__ == "__main__":
    app.run(main)
