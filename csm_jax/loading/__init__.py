"""Checkpoints by name: from what `load` is given to tensors, a config and a tokenizer."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csm_jax import config as presets
from csm_jax.checkpoints import native_format, peft_files
from csm_jax.checkpoints.random_weights import random_tensors
from csm_jax.config import CSMConfig
from csm_jax.errors import CheckpointError, InputError
from csm_jax.io.contents import mistaken_file
from csm_jax.loading import hub
from csm_jax.prompt.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

RANDOM = {
    "random:tiny": presets.tiny,
    "random:csm_1b": presets.csm_1b,
    "random:miso_8b": presets.miso_8b,
}
# Part of the package; `examples/demo_checkpoint/` is how it was made.
BUNDLED = {"demo": Path(__file__).parent / "demo"}
NAMES = (*BUNDLED, *RANDOM)

# How the hub's pages and other programs write the name of a repository.
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://")
_REVISION = re.compile(r"([^/]+/[^/]+)/(?:tree|blob)/([^/]+)")

logger = logging.getLogger("csm_jax")


class Source(NamedTuple):
    """A checkpoint that is ready to be read.

    Attributes:
      tensors: (path, array) of every parameter, once.
      is_int8: whether matrices are stored as int8.
      directory: its files; None for random weights.
    """

    config: CSMConfig
    tokenizer: Tokenizer
    tensors: Iterator[tuple[str, np.ndarray]]
    is_int8: bool
    directory: Path | None


def open_source(
    name: str | Path, adapters: str | Path | None = None, revision: str | None = None
) -> Source:
    """Finds a checkpoint by name, and adds adapters to its weights.

    Args:
      name, adapters, revision: as for `csm_jax.load`.

    Raises:
      InputError: there is a revision, and the name has one already or is none of the hub.
      CheckpointError: there is no such checkpoint, or its files cannot be read; the same of the
        adapters; or its weights are int8, to which nothing can be added.
    """
    source = _open(name if revision is None else hub.with_revision(str(name), revision))
    if adapters is None:
        return source
    directory = find_adapters(adapters)
    tensors = peft_files.merge_files(source.tensors, source.config, directory, source.is_int8)
    base = peft_files.base_name(directory)
    if _is_other(base, str(name)):
        logger.warning("%s: the adapters are of %s, and are added to %s", adapters, base, name)
    return source._replace(tensors=tensors)


def _is_other(base: str | None, name: str) -> bool:
    """Whether two names are of different repositories; nothing is known of directories."""
    if base is None or not hub.is_name(base) or Path(name).exists():
        return False
    return base.partition("@")[0].lower() != name.partition("@")[0].lower()


def _open(name: str | Path) -> Source:
    directory = find_directory(str(name))
    if directory is None:
        config = RANDOM[str(name)]()
        return Source(config, byte_tokenizer(config), random_tensors(config), False, None)
    if native_format.is_native(directory):
        config = native_format.load_config(directory)
        tensors, is_int8 = (
            native_format.read_params(directory, config),
            native_format.is_int8(directory),
        )
    else:
        from csm_jax.convert.layouts import open_checkpoint

        opened = open_checkpoint(directory)
        config, is_int8 = opened.config, False
        tensors = opened.tensors(native_format.flatten(native_format.param_shapes(config)))
    return Source(config, load_tokenizer(directory, config), tensors, is_int8, directory)


def find_adapters(name: str | Path) -> Path:
    """The directory of LoRA adapters, downloaded if need be.

    Args:
      name: a directory, or a hub name such as someone/csm-lora or someone/csm-lora/checkpoint-500.

    Raises:
      CheckpointError: there are no adapters of this name.
    """
    if not isinstance(name, str | os.PathLike) or not str(name).strip():
        raise InputError(f"adapters is {name!r}, but must be the name of one directory")
    directory = Path(name).expanduser()
    if os.path.exists(directory):  # False for impossible names
        return directory
    if hub.is_adapters_name(str(name)):
        return hub.download_adapters(str(name))
    raise CheckpointError(f"{name} is no directory: name one with adapters{meant_name(str(name))}")


def find_directory(name: str) -> Path | None:
    """The directory of a checkpoint, downloaded if need be; None for random weights.

    Raises:
      CheckpointError: there is no checkpoint of this name.
    """
    if name in RANDOM:
        return None
    if not name.strip():
        raise CheckpointError(f"the checkpoint has no name: {', '.join(NAMES)}, or a directory")
    directory = BUNDLED.get(name) or Path(name).expanduser()
    # Of os.path, because those of Path raise an error for impossible names.
    if os.path.isdir(directory):
        return directory
    if os.path.isfile(directory):
        if what := mistaken_file(directory):
            raise CheckpointError(f"checkpoint {name} is {what}")
        raise CheckpointError(
            f"checkpoint {name} is a file: name its directory, or convert the file first, with "
            f"csm_jax.convert --source={name}"
        )
    if hub.is_name(name):
        return hub.native_copy(name)
    raise CheckpointError(
        f"checkpoint {name} is neither a directory nor a hub name such as sesame/csm-1b, nor one "
        f"of {', '.join(NAMES)}{meant_name(name)}"
    )


def meant_name(name: str) -> str:
    """The name that an address of the hub or a name in another case stands for, for a message."""
    plain = _ADDRESS.sub("", name.strip()).rstrip("/")
    if match := _REVISION.fullmatch(plain):
        plain = f"{match[1]}@{match[2]}"
    plain = plain.lower() if plain.lower() in NAMES else plain
    is_name = plain in NAMES or hub.is_name(plain)
    return f"; write {plain}" if is_name and plain != name else ""
