"""Flags of the watermark of generated speech."""

from absl import flags

from csm_jax.cli import flags as cli
from csm_jax.errors import InputError
from csm_jax.watermark.message import Key, check_key


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
