"""Where the weights of a watermark are; they are downloaded only when that is asked for."""

from pathlib import Path

from csm_jax.errors import CheckpointError, InputError
from csm_jax.io.files import make_directory
from csm_jax.loading import hub
from csm_jax.watermark.checkpoint import FILES, Weights, load, read_torch, save
from csm_jax.watermark.marking import Watermark
from csm_jax.watermark.message import PUBLIC_KEY, Key

REPOSITORY = "sony/silentcipher"
_FOLDER = "44_1_khz/73999_iteration"
LICENSE = (
    "SilentCipher's code has the MIT license; the terms of its weights are those of the model card "
    f"of {REPOSITORY}"
)
MODES = ("auto", "on", "off")
HOW_TO_GET = f"python -m csm_jax.watermark --convert={REPOSITORY}"


def default_file() -> Path:
    """Where `convert` writes, and where the commands look."""
    return hub.cache_directory() / "watermark" / "silentcipher_44k.safetensors"


def find_weights(name: str | None = None) -> Weights | None:
    """The weights, or None if none are named and `default_file` does not exist.

    Args:
      name: a file of `convert`, or a directory of SilentCipher's files, for which torch is needed.

    Raises:
      CheckpointError: what is named is not there, or cannot be read.
    """
    if name is None:
        file = default_file()
        return load(file) if file.is_file() else None
    path = Path(name)
    if path.is_dir():
        return read_torch(path)
    if not path.is_file():
        raise CheckpointError(
            f"watermark weights {name} do not exist: name a file that {HOW_TO_GET} writes"
        )
    return load(path)


def choose(mode: str, name: str | None = None, key: Key | None = None) -> Watermark | None:
    """What all speech of a program is marked with; None for speech that is not marked.

    Args:
      mode: one of `MODES`; auto marks if there are weights.
      name: as for `find_weights`.
      key: None is Sesame's public one.

    Raises:
      InputError: there is no such mode, or weights or a key are given with mode off.
      CheckpointError: there are no weights and a mark is asked for, or they cannot be read.
    """
    if mode not in MODES:
        raise InputError(f"watermark is {mode}, but must be one of {', '.join(MODES)}")
    if mode == "off":
        if name is not None or key is not None:
            raise InputError("watermark=off takes no watermark_weights and no watermark_key")
        return None
    weights = find_weights(name)
    if weights is not None:
        return Watermark(weights, PUBLIC_KEY if key is None else key)
    if mode == "on" or key is not None:
        raise CheckpointError(f"there are no weights of a watermark: {HOW_TO_GET} ({LICENSE})")
    return None


def convert(source: str, out: Path | None = None) -> Path:
    """Converts SilentCipher's PyTorch files to a native file, and returns its path.

    Args:
      source: a directory, or a name on the Hugging Face hub, from which they are downloaded.
      out: default: `default_file`.

    Raises:
      CheckpointError: the files cannot be downloaded or read, or torch is not installed.
      OutputError: the file cannot be written.
    """
    out = default_file() if out is None else out
    directory = Path(source)
    if not directory.is_dir():
        if not hub.is_name(source):
            raise CheckpointError(f"{source} is neither a directory nor a name on the hub")
        directory = hub.download_files(source, [f"{_FOLDER}/{file}" for file in FILES]) / _FOLDER
    weights = read_torch(directory)
    make_directory(out.parent)
    save(weights, out)
    return out
