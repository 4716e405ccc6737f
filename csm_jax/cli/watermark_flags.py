"""Flags of the watermark of generated speech."""

from absl import flags

from csm_jax.cli import flags as cli
from csm_jax.loading import RANDOM
from csm_jax.watermark import MODES, Watermark, choose, parse_key
from csm_jax.watermark.finding import HOW_TO_GET, LICENSE
from csm_jax.watermark.message import Key


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
    return None if values.watermark_key is None else parse_key(",".join(values.watermark_key))


def read_watermark(values: flags.FlagValues) -> Watermark | None:
    """What the flags ask to mark all speech with, as `watermark.choose`; also its errors."""
    return choose(values.watermark, values.watermark_weights, read_key(values))


def warn_if_unmarked(values: flags.FlagValues, watermark: Watermark | None) -> None:
    """Says that speech is not marked, if the flags do not ask for that.

    Of random weights there is no speech.
    """
    if watermark is None and values.watermark != "off" and values.checkpoint not in RANDOM:
        cli.warn(f"speech is not marked as generated: {HOW_TO_GET} gets what it needs ({LICENSE})")
