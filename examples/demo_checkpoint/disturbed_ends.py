"""Measures what the guard makes of speech whose end is disturbed.

    pip install pocketsphinx
    python examples/demo_checkpoint/disturbed_ends.py --biases=0,-9,9

A bias is added to the logit of code 0 in codebook 0, with which the end of speech begins, at
every frame: below 0 speech runs on, above 0 it ends early. For each bias, without the guard and
with it, a line has the share of takes that ran on or ended early, compared with the undisturbed
ones, the share that was cut, the word error rate of digits, and how many takes have the codes of
the undisturbed model without a guard.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from hearing import recognize_digits
from judge import draw_requests

import csm_jax
from csm_jax.evaluate.word_errors import count_errors
from csm_jax.inference.ticket import Ticket

CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "as for csm_jax.generate")
BIASES = flags.DEFINE_list("biases", ["0", "-9", "9"], "what is added to the logit of the end")
COUNT = flags.DEFINE_integer("count", 300, "strings of digits")
SEED = flags.DEFINE_integer("seed", 11, "seed of the texts and the speech")
BATCH = flags.DEFINE_integer("batch", 16, "requests in a batch")

# A take is another than the undisturbed one if it has so much more, or less, of its length.
TOLERANCE = 0.2
# Notices of takes that were cut at their length limit, or by the guard without a text.
CUT = {"cut", "guard_cut"}


@dataclasses.dataclass(frozen=True)
class Takes:
    """What was spoken: the codes of each request, and which of them were cut."""

    codes: list[np.ndarray]
    is_cut: list[bool]


def speak(
    model: csm_jax.Generator, requests: Sequence[csm_jax.Request], bias: float, guard: str
) -> Takes:
    """Speaks the requests with a disturbed end of speech."""
    inference = dataclasses.replace(model.inference, end_bias=bias)
    with csm_jax.Engine(dataclasses.replace(model, inference=inference), BATCH.value) as engine:
        tickets: list[Ticket] = [
            engine.submit(dataclasses.replace(each, guard=guard), stream=False, wait=True)
            for each in requests
        ]
        codes = [ticket.codes() for ticket in tickets]
    return Takes(codes, [bool({n.kind for n in each.notices} & CUT) for each in tickets])


def count_word_errors(
    model: csm_jax.Generator, requests: Sequence[csm_jax.Request], takes: Takes
) -> np.ndarray:
    """The wrong words of each take; one beyond 60 frames is judged by its first 60."""
    errors = []
    for request, codes in zip(requests, takes.codes, strict=True):
        recognized = []
        if len(codes):
            recognized = recognize_digits(model.decode(codes[:60]), model.sample_rate)
        errors.append(count_errors(request.text.split(), recognized).errors)
    return np.array(errors)


def main(_: list[str]) -> None:
    model = csm_jax.load(CHECKPOINT.value, dtype="float32")
    requests = draw_requests(COUNT.value, SEED.value)
    num_words = np.array([len(request.text.split()) for request in requests])
    undisturbed = speak(model, requests, 0.0, "off")
    lengths = np.array([len(codes) for codes in undisturbed.codes])
    print("bias  guard  ran on  ended early  cut   errors  unchanged")
    for bias, guard in itertools.product(map(float, BIASES.value), ("off", "on")):
        takes = speak(model, requests, bias, guard)
        errors = count_word_errors(model, requests, takes)
        share = np.array([len(codes) for codes in takes.codes]) / np.maximum(lengths, 1)
        unchanged = map(np.array_equal, takes.codes, undisturbed.codes)
        print(
            f"{bias:4.0f}  {guard:>5}  {np.mean(share > 1 + TOLERANCE):6.1%}  "
            f"{np.mean(share < 1 - TOLERANCE):11.1%}  {np.mean(takes.is_cut):4.1%}  "
            f"{errors.sum() / num_words.sum():.4f}  {sum(unchanged):9d}",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
