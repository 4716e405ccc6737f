"""Says whether a recording has a watermark, and by which key.

    python -m csm_jax.watermark --convert=sony/silentcipher
    python -m csm_jax.watermark --audio=speech.wav

The first command downloads the weights, which needs torch once, and the second reads recordings in
all formats. A mark that is not found proves nothing: see the limits in README.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from csm_jax.cli import flags as cli
from csm_jax.cli import watermark_flags
from csm_jax.errors import CheckpointError, InputError
from csm_jax.io.audio import is_headerless, load_audio
from csm_jax.io.samples import SAMPLE_RATE, is_silent
from csm_jax.watermark import PUBLIC_KEY, Detection, Verdict, convert, detect, find_weights
from csm_jax.watermark.decision import MIN_PERIODS
from csm_jax.watermark.finding import HOW_TO_GET, LICENSE
from csm_jax.watermark.message import Key

PROGRAM = "csm_jax.watermark"


def define_flags(values: flags.FlagValues) -> None:
    define = cli.definer(values)
    define(flags.DEFINE_string, "audio", None, "the recording to look at")
    source = "directory or hub name of SilentCipher's PyTorch files, to be converted"
    define(flags.DEFINE_string, "convert", None, source)
    define(flags.DEFINE_string, "out", None, "file of --convert; default: in the cache")
    watermark_flags.define_weights_and_key(values)


def main(values: flags.FlagValues) -> None:
    if (values.audio is None) == (values.convert is None):
        raise InputError("give either --audio or --convert")
    if values.convert is not None:
        out = convert(values.convert, None if values.out is None else Path(values.out))
        cli.show(f"{out}: {LICENSE}")
        return
    key = watermark_flags.read_key(values)
    weights = find_weights(values.watermark_weights)
    if weights is None:
        raise CheckpointError(f"there are no weights to read a watermark with: {HOW_TO_GET}")
    path, rate = Path(values.audio), weights.config.sample_rate
    if is_headerless(path):
        rate = SAMPLE_RATE  # as they are written here
    samples = load_audio(path, rate)
    known = dict.fromkeys([PUBLIC_KEY if key is None else key, PUBLIC_KEY])
    found = detect(samples, rate, weights, tuple(known))
    period = weights.config.period * weights.config.hop / weights.config.sample_rate
    cli.show(f"{path}: {describe(found, samples, len(samples) / rate, key, period)}")


def describe(
    found: Detection, samples: np.ndarray, seconds: float, key: Key | None, period: float
) -> str:
    """One line of what was found.

    Args:
      key: the one that the user has named.
      period: of a message, in seconds.
    """
    if is_silent(samples):
        return "silent: there is no sound to hold a mark"
    if found.verdict is Verdict.TOO_SHORT:
        return (
            f"too short to tell: {seconds:.1f} s, and a mark is found in {MIN_PERIODS * period:.1f}"
        )
    if found.key is None:
        return "no mark was found; that is no proof that it was not generated"
    numbers = ",".join(map(str, found.key))
    share = f"{found.confidence:.0%} of its symbols agree"
    if key is not None and found.key != key:
        return f"marked by another key, {numbers}; {share}"
    whose = "by the public key of Sesame's code" if found.key == PUBLIC_KEY else "by the key"
    return f"marked {whose}, {numbers}; {share}"


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
