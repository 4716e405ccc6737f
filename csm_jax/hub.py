"""Checkpoints by name: downloaded once, converted once, then read from the native copy."""

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from csm_jax.checkpoints import native_format
from csm_jax.errors import CheckpointError, first_line
from csm_jax.io.files import make_once

# The codec of a checkpoint in Sesame's layout, which has none inside.
CODEC_REPOSITORY = "kyutai/mimi"
# Files of a repository: recordings of voices, and parameters.
_PROMPTS = re.compile(r"^prompts/")
_WEIGHTS = re.compile(r"\.(safetensors|pt)$")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def cache_directory() -> Path:
    """The directory of this package's cache: $CSM_JAX_CACHE, or csm-jax in the user's own cache."""
    if "CSM_JAX_CACHE" in os.environ:
        return Path(os.environ["CSM_JAX_CACHE"])
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "csm-jax"


def is_name(name: str) -> bool:
    """Whether this can be the name of a repository."""
    return bool(_NAME.fullmatch(name)) and not name.startswith((".", "~"))


def native_copy(repository: str) -> Path:
    """The native checkpoint of a hub repository, made on the first call.

    Of several processes one makes it, and the others wait. The download uses huggingface_hub, its
    token and its cache. Remove the returned directory to follow a repository that has changed.

    Raises:
      CheckpointError: a file cannot be downloaded; the message says which and what to do.
    """
    native = cache_directory() / "checkpoints" / repository.replace("/", "--")
    make_once(native, lambda: native_format.is_native(native), lambda: _convert(repository, native))
    return native


def _convert(repository: str, native: Path) -> None:
    from csm_jax.convert.layouts import needs_codec
    from csm_jax.convert.native import write_native

    source = download(repository)
    codec = download(CODEC_REPOSITORY) if needs_codec(source) else None
    write_native(source, native, codec)


def download(repository: str) -> Path:
    """Downloads a repository's config, tokenizer and one of its checkpoints.

    Returns the directory that holds them. Raises `CheckpointError` as `native_copy` does.
    """
    config = _fetch(repository, "config.json")
    for file in _wanted(repository, config.parent):
        _fetch(repository, file)
    return config.parent


def download_prompts(repository: str) -> list[Path]:
    """Downloads the files in a repository's `prompts/`. Raises `CheckpointError`."""
    snapshot = _fetch(repository, "config.json").parent
    files = [file for file in _list(repository, snapshot, _PROMPTS) if _PROMPTS.search(file)]
    return [_fetch(repository, file) for file in files]


def _list(repository: str, snapshot: Path, wanted: re.Pattern[str]) -> list[str]:
    """The files of a repository; offline those in the cache, if any of them matches `wanted`."""
    try:
        return huggingface_hub.HfApi().list_repo_files(repository)
    except Exception as error:
        files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
        if not any(wanted.search(file) for file in files):
            raise _unreachable(repository, "the list of files", error) from error
        return files


def _wanted(repository: str, snapshot: Path) -> list[str]:
    """The files of a repository that this package reads, of only one checkpoint if it has two."""
    files = _list(repository, snapshot, _WEIGHTS)
    weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    split = [file for file in weights if file.startswith("transformers")]
    weights = split or weights or [file for file in files if file.endswith(".pt")]
    small = native_format.TOKENIZER_FILES + native_format.SMALL_FILES
    return [file for file in small if file in files] + sorted(weights)


def _fetch(repository: str, file: str) -> Path:
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _unreachable(repository, file, error) from error


def _unreachable(repository: str, wanted: str, error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return CheckpointError(
        f"{wanted} of {repository} could not be downloaded ({reason}): "
        "check the network and the name, accept the model's terms on its page and log in with "
        "`hf auth login` or HF_TOKEN, or name a local directory instead"
    )
