"""Measures what classifier-free guidance over the text does to the word errors of digits.

    pip install pocketsphinx
    python examples/demo_checkpoint/guidance_errors.py --count=200 --scales=0,0.5,1,1.5,2,3

The same strings are spoken with each scale, and a recognizer of digits counts the words that are
wrong, missing or too many. A scale of 1 is the model alone; with 0 it does not know the text.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from judge import draw_requests, speak, word_error_rate

import csm_jax


def main(argv: Sequence[str] | None = None) -> dict[float, float]:
    """Prints and returns the word error rate of each scale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--scales", default="0,1,2")
    parser.add_argument("--over", default="text", choices=("text", "context"))
    parser.add_argument("--codebook0", action="store_true", help="leave the others unguided")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--count", type=int, default=8, help="strings of digits")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=21, help="of the texts")
    arguments = parser.parse_args(argv)

    model = csm_jax.load(arguments.checkpoint, dtype="float32")
    sampling = csm_jax.Sampling(temperature=arguments.temperature)
    # The guard would mend what is measured.
    fields = {"sampling": sampling, "guard": "off"}
    requests = draw_requests(arguments.count, arguments.seed)
    rates = {}
    for scale in map(float, arguments.scales.split(",")):
        guidance = csm_jax.Guidance(scale, arguments.over, not arguments.codebook0)
        changes = csm_jax.Interventions(guidance=guidance)
        guided = [dataclasses.replace(each, interventions=changes, **fields) for each in requests]
        rates[scale] = word_error_rate(speak(model, guided, arguments.batch))
        print(f"scale {scale:g}: word error rate {rates[scale]:.3f}")
    return rates


if __name__ == "__main__":
    main()
