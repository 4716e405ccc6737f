"""Converts checkpoints from the command line.

python -m csm_jax.convert --source=DIR_OR_HUB_NAME --out=DIR              any layout to native
python -m csm_jax.convert --source=NATIVE_DIR --out=DIR --to=hf           and back; demo too
python -m csm_jax.convert --source=NAME --adapters=DIR --out=DIR          with LoRA adapters merged
python -m csm_jax.convert --verify=DIR                                    checks for damage
"""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from csm_jax.checkpoints import native_format
from csm_jax.cli import flags as cli
from csm_jax.convert.export import export_huggingface
from csm_jax.convert.layouts import read_sizes
from csm_jax.convert.native import write_native
from csm_jax.convert.verify import verify
from csm_jax.errors import CheckpointError, InputError
from csm_jax.loading import BUNDLED, NAMES, Source, find_directory, hub, meant_name, open_source
from csm_jax.model.precision import DTYPES, QUANTIZE

PROGRAM = "csm_jax.convert"
CONVERSION_FLAGS = (
    *("source", "out", "to", "codec", "tokenizer", "config"),
    *("adapters", "quantize", "dtype"),
)


def define_flags(values: flags.FlagValues) -> None:
    define = functools.partial(cli.definer(values), flags.DEFINE_string)
    define("source", None, "directory or file in any layout, or a hub name such as sesame/csm-1b")
    define("out", None, "directory to write; must not exist yet")
    define("to", "native", "native, or hf for transformers' layout")
    define("codec", None, "Mimi, directory or file: Sesame's layout has none inside")
    define("tokenizer", None, "tokenizer.json or *.model, if the source has none")
    define("config", None, "config.json of any layout with the sizes, if the source has none")
    define("adapters", None, "LoRA adapters to add to the weights: directory or hub name")
    define("verify", None, "directory to look for damage in; takes no other flag")
    define("quantize", "none", "none or int8")
    define("dtype", None, f"{', '.join(DTYPES)}; default: as stored")


def main(values: flags.FlagValues) -> None:
    if values.verify is not None:
        if others := [n for n in CONVERSION_FLAGS if values[n].present]:
            raise InputError(f"--verify takes no other flag, but --{others[0]} is given")
        cli.show(verify(Path(values.verify).expanduser()))
        return
    if values.source is None or values.out is None:
        raise InputError("give --source and --out")
    if values.dtype not in (None, *DTYPES):
        raise InputError(f"dtype is {values.dtype}, but must be one of {', '.join(DTYPES)}")
    if values.quantize not in QUANTIZE:
        raise InputError(f"quantize is {values.quantize}, but must be {' or '.join(QUANTIZE)}")
    dtype = None if values.dtype is None else jnp.dtype(values.dtype)
    out = Path(values.out)
    if values.to == "native":
        _to_native(values, out, dtype)
    elif values.to == "hf":
        _to_huggingface(values, out, dtype)
    else:
        raise InputError(f"--to is {values.to}, but must be native or hf")


def _to_native(values: flags.FlagValues, out: Path, dtype: jnp.dtype | None) -> None:
    if values.adapters is not None:
        _merge(values, out, dtype)
        return
    source = _source(values.source)
    if native_format.is_native(source):
        raise CheckpointError(f"{source} is native already; --to=hf converts it back")
    codec = None if values.codec is None else Path(values.codec)
    config = None if values.config is None else read_sizes(Path(values.config).expanduser())
    tokenizer = None if values.tokenizer is None else Path(values.tokenizer)
    write_native(source, out, codec, config, tokenizer, dtype, int8=values.quantize == "int8")


def _merge(values: flags.FlagValues, out: Path, dtype: jnp.dtype | None) -> None:
    """A native checkpoint with the adapters in its weights."""
    _refuse(values, ("codec", "tokenizer", "config"), "--adapters")
    source = open_source(values.source, values.adapters)
    int8 = values.quantize == "int8"
    native_format.save(
        out, source.config, source.tensors, source.tokenizer, _small_files(source), dtype, int8
    )


def _to_huggingface(values: flags.FlagValues, out: Path, dtype: jnp.dtype | None) -> None:
    _refuse(values, ("codec", "tokenizer", "config"), "--to=hf")
    if values.quantize == "int8":
        raise InputError("--quantize=int8 and --to=hf do not go together: that layout has no int8")
    directory = find_directory(values.source)
    is_published = directory is not None and not native_format.is_native(directory)
    if is_published and values.source not in BUNDLED and values.adapters is None:
        raise CheckpointError(f"{directory} is no native checkpoint: --to=hf starts from one")
    source = open_source(values.source, values.adapters)
    if source.is_int8:
        raise CheckpointError(
            f"{values.source} is stored as int8, which this layout does not have: export the "
            "checkpoint that it was made from"
        )
    small = _small_files(source)
    export_huggingface(source.config, source.tensors, source.tokenizer, small, out, dtype)


def _refuse(values: flags.FlagValues, names: Sequence[str], other: str) -> None:
    for name in names:
        if values[name].value is not None:
            raise InputError(f"--{name} and {other} do not go together: convert first")


def _small_files(source: Source) -> list[Path]:
    return native_format.small_files(source.directory) if source.directory else []


def _source(name: str) -> Path:
    if name in NAMES and name not in BUNDLED:
        raise InputError(f"{name} has no files to convert; --to=hf writes it")
    path = BUNDLED.get(name) or Path(name).expanduser()
    if name.strip() and os.path.exists(path):  # False for impossible names
        return path
    if not hub.is_name(name):
        raise CheckpointError(f"source {name!r} does not exist{meant_name(name)}")
    return hub.download(name)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
