"""Flags of the watermark of generated speech."""

from absl import flags

from csm_jax.cli import flags as cli
from csm_jax.errors import CheckpointError, InputError
from csm_jax.loading import RANDOM
from csm_jax.watermark import Watermark, find_weights
from csm_jax.watermark.finding import HOW_TO_GET, LICENSE
from csm_jax.watermark.message import PUBLIC_KEY, Key, check_key

MODES = ("auto", "on", "off")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `read_watermark`."""
    mode = "mark speech as generated, inaudibly; auto: if there are weights for it"
    flags.DEFINE_enum("watermark", "auto", MODES, mode, flag_values=values)
    define_weights_and_key(values)


def define_weights_and_key(values: flags.FlagValues) -> None:
    """Defines `--watermark_weights` and `--watermark_key`."""
    define = cli.definer(values)
    weights = "file of csm_jax.watermark --convert; default: the one in the cache"
    define(flags.DEFINE_string, "watermark_weights", None, weights)
    key = "five numbers from 0 to 255; default: the public key of Sesame's code"
    define(flags.DEFINE_list, "watermark_key", None, key)


def read_key(values: flags.FlagValues) -> Key | None:
    """The key that was given. Raises `InputError` if it is none."""
    given = values.watermark_key
    if given is None:
        return None
    if not all(text.strip().isascii() and text.strip().isdecimal() for text in given):
        raise InputError(
            f"--watermark_key is {','.join(given)}: give five numbers from 0 to 255, such as "
            "212,211,146,56,201"
        )
    return check_key([int(text) for text in given])


def read_watermark(values: flags.FlagValues) -> Watermark | None:
    """What the flags ask to mark all speech with; None for speech that is not marked.

    Raises:
      InputError: the key is none, or weights or a key are given with `--watermark=off`.
      CheckpointError: there are no weights and `--watermark=on`, or those named cannot be read.
    """
    mode, name, key = values.watermark, values.watermark_weights, read_key(values)
    if mode == "off":
        if name is not None or key is not None:
            raise InputError("--watermark=off takes no --watermark_weights and no --watermark_key")
        return None
    weights = find_weights(name)
    if weights is not None:
        return Watermark(weights, PUBLIC_KEY if key is None else key)
    if mode == "on" or key is not None:
        raise CheckpointError(f"there are no weights of a watermark: {HOW_TO_GET} ({LICENSE})")
    return None


def warn_if_unmarked(values: flags.FlagValues, watermark: Watermark | None) -> None:
    """Says that speech is not marked, if the flags do not ask for that.

    Of random weights there is no speech.
    """
    if watermark is None and values.watermark != "off" and values.checkpoint not in RANDOM:
        cli.warn(f"speech is not marked as generated: {HOW_TO_GET} gets what it needs ({LICENSE})")
