"""Measures what several takes do to the word errors of digits.

    pip install pocketsphinx
    python examples/demo_checkpoint/best_takes.py --count=600

The same strings are spoken once and as the best of several takes, whose first is that one take. It
prints the word error rates and a confidence interval of their difference.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from absl import app, flags
from judge import draw_requests, speak

import csm_jax
from csm_jax.evaluate import bootstrap

CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "as for csm_jax.generate")
TAKES = flags.DEFINE_integer("takes", 4, "of each string, of which the best is kept")
COUNT = flags.DEFINE_integer("count", 600, "strings of digits")
SEED = flags.DEFINE_integer("seed", 21, "seed of the texts and the speech")
BATCH = flags.DEFINE_integer("batch", 16, "takes in a batch")


def measure(
    model: csm_jax.Generator, requests: Sequence[csm_jax.Request], best_of: int
) -> Mapping[str, np.ndarray]:
    """The errors and the words of each string."""
    wanted = [dataclasses.replace(each, best_of=best_of) for each in requests]
    spoken = speak(model, wanted, BATCH.value)
    return {
        "errors": np.array([each.errors for each in spoken]),
        "words": np.array([len(each.words) for each in spoken]),
    }


def word_error_rate(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    return columns["errors"].sum(-1) / columns["words"].sum(-1)


def main(_: list[str]) -> None:
    model = csm_jax.load(CHECKPOINT.value, dtype="float32")
    requests = draw_requests(COUNT.value, SEED.value)
    runs = {best_of: measure(model, requests, best_of) for best_of in (1, TAKES.value)}
    for best_of, columns in runs.items():
        print(f"best of {best_of}: word error rate {word_error_rate(columns):.4f}")
    difference = bootstrap.compare(*runs.values(), {"word error rate": word_error_rate})
    print(difference["word error rate"])


if __name__ == "__main__":
    app.run(main)
