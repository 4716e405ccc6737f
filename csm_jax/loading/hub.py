"""Names on the Hugging Face hub: downloaded once, converted once, then read from the native copy.

A name is OWNER/NAME or OWNER/NAME@REVISION, where a revision is a branch, a tag or a commit.
Adapters can also lie in a folder: OWNER/NAME/FOLDER or OWNER/NAME/FOLDER@REVISION.
"""

import contextlib
import functools
import logging
import os
import re
import stat
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from csm_jax.checkpoints import native_format, peft_files
from csm_jax.config import read_json
from csm_jax.errors import CheckpointError, InputError, OutputError, first_line
from csm_jax.io.files import make_once, replace_file
from csm_jax.prompt.tokenizer import has_tokenizer

# The codec of a checkpoint in Sesame's layout, which has none inside.
CODEC_REPOSITORY = "kyutai/mimi"
# The tokenizer of a checkpoint that comes without one, as MisoTTS: the one its reference loads.
TOKENIZER_REPOSITORY = "meta-llama/Llama-3.2-1B"
# Files of a repository: recordings of voices, parameters, and adapters.
_PROMPTS = re.compile(r"^prompts/")
_WEIGHTS = re.compile(r"\.(safetensors|pt|pth|ckpt|bin)$")
_LONE_WEIGHTS = ("model.safetensors", "ckpt.pt")
_ADAPTERS = re.compile(r"(^|/)adapter_model\.")
_NAME = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Seconds to wait for the hub to say which commit a branch is at.
_TIMEOUT = 10.0

logger = logging.getLogger("csm_jax")


def cache_directory() -> Path:
    """The directory of this package's cache: $CSM_JAX_CACHE, or csm-jax in the user's own cache.

    A user without a home directory, as in a container, has a directory for temporary files instead.
    """
    if given := os.environ.get("CSM_JAX_CACHE"):
        return Path(given)
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "csm-jax"
    try:
        return Path.home() / ".cache" / "csm-jax"
    except RuntimeError:
        return _temporary_cache()


@functools.cache
def _temporary_cache() -> Path:
    """A private directory, the same one each time unless another user has taken its name."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    directory = Path(tempfile.gettempdir()) / f"csm-jax-{user}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        # Compiled programs are run from it: no other user may write there.
        is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if not is_private or found.st_uid != user:
            directory = Path(tempfile.mkdtemp(prefix="csm-jax-"))
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be made ({error.strerror}) and the user has no home directory: "
            "name a directory for the cache with CSM_JAX_CACHE"
        ) from error
    logger.warning(
        "the user has no home directory: the cache is %s; CSM_JAX_CACHE names another", directory
    )
    return directory


def is_name(name: str) -> bool:
    """Whether this can be the name of a repository."""
    return is_adapters_name(name) and not _split_folder(name)[1]


def is_adapters_name(name: str) -> bool:
    """Whether this can be the name of a repository, or of a folder of one."""
    return bool(_NAME.fullmatch(name)) and not name.startswith((".", "~"))


def with_revision(name: str, revision: str) -> str:
    """The name of a repository at a revision.

    Raises:
      InputError: this is no name of a repository, or it has a revision already.
    """
    if Path(name).expanduser().exists() or not is_name(name):
        raise InputError(
            f"revision is {revision}, but {name} is no repository of the hub: only those have "
            "revisions"
        )
    if "@" in name:
        raise InputError(f"revision is {revision}, but {name} has a revision already: drop one")
    return f"{name}@{revision}"


def _split(name: str) -> tuple[str, str]:
    """Repository and revision of a name."""
    repository, folder, revision = _split_folder(name)
    if folder:
        raise _no_name(name)
    return repository, revision


def _split_folder(name: str) -> tuple[str, str, str]:
    """Repository, folder and revision of a name; the folder is empty or ends with a slash."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise _no_name(name)
    folder = f"{match[2].lstrip('/')}/" if match[2] else ""
    return match[1], folder, match[3] or "main"


def _no_name(name: str) -> CheckpointError:
    return CheckpointError(f"{name} is no name on the hub, such as sesame/csm-1b")


def native_copy(name: str) -> Path:
    """The native checkpoint of a repository, made on the first call for each of its commits.

    The hub is asked which commit is meant, unless the name has one; if it cannot be reached, the
    last known commit is used. Of several processes one makes the copy, and the others wait. The
    download uses huggingface_hub, its token and its cache.

    Raises:
      CheckpointError: a file cannot be downloaded; the message says which and what to do.
    """
    repository, revision = _split(name)
    copies = cache_directory() / "checkpoints"
    try:
        commit = _commit(repository, revision)
    except CheckpointError:
        # Made by a version that knew no commits.
        older = copies / _flat(repository)
        if revision == "main" and native_format.is_native(older):
            logger.warning("%s: the hub cannot be reached; %s is used", repository, older)
            return older
        raise
    native = copies / f"{_flat(repository)}@{commit}"
    make_once(
        native,
        lambda: native_format.is_native(native),
        lambda: _convert(f"{repository}@{commit}", native),
    )
    _remember(repository, revision, commit)
    return native


def _convert(name: str, native: Path) -> None:
    from csm_jax.convert.layouts import needs_codec
    from csm_jax.convert.native import write_native

    source = download(name)
    codec = download(CODEC_REPOSITORY) if needs_codec(source) else None
    tokenizer = None if has_tokenizer(source) else _download_tokenizer()
    write_native(source, native, codec, tokenizer=tokenizer)
    repository = _flat(_split(name)[0])
    for other in sorted(native.parent.glob(f"{repository}*")):
        if other != native and other.name.partition("@")[0] == repository:
            logger.warning("%s is of another revision; remove it if nothing uses it", other)


def _commit(repository: str, revision: str, file: str = "config.json") -> str:
    """The commit that a revision is at: as the hub says, or else as was known last.

    Args:
      file: one that the repository has.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        url = huggingface_hub.hf_hub_url(repository, file, revision=revision)
        commit = huggingface_hub.get_hf_file_metadata(url, timeout=_TIMEOUT).commit_hash
    except Exception as error:  # of the network library, which changes with the hub's library
        if isinstance(error, EntryNotFoundError) and (
            commit := _commit_without_config(repository, revision)
        ):
            return commit
        known = _known_commit(repository, revision, file)
        if known is None:
            return _snapshot(_fetch(repository, file, revision), file).name
        if not constants.HF_HUB_OFFLINE:
            logger.warning(
                "%s: the hub does not say whether it was updated (%s); commit %s is used",
                repository,
                type(error).__name__,
                known[:8],
            )
        return known
    if commit is None:
        return _snapshot(_fetch(repository, file, revision), file).name
    if commit != _cached_commit(repository, revision, file):
        # Moves the revision in the cache of the hub's library too, unless that is read only.
        with contextlib.suppress(CheckpointError):
            _fetch(repository, file, revision)
    return commit


def _commit_without_config(repository: str, revision: str) -> str | None:
    """The commit of a repository of nothing but weights, as MisoTTS; None if it has none."""
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT)
    except (HfHubHTTPError, OSError):
        return None
    has_weights = any(file.rfilename in _LONE_WEIGHTS for file in info.siblings or ())
    return info.sha if has_weights else None


def _known_commit(repository: str, revision: str, file: str) -> str | None:
    """The commit that a revision was at when it was last used."""
    if cached := _cached_commit(repository, revision, file):
        return cached
    with contextlib.suppress(OSError):  # that cache may have been removed
        commit = _reference(repository, revision).read_text().strip()
        return commit if _COMMIT.fullmatch(commit) else None
    return None


def _cached_commit(repository: str, revision: str, file: str) -> str | None:
    """The commit of a revision in the cache of the hub's library."""
    cached = huggingface_hub.try_to_load_from_cache(
        repository, file, cache_dir=_hub_cache(), revision=revision
    )
    return _snapshot(Path(cached), file).name if isinstance(cached, str) else None


def _snapshot(path: Path, file: str) -> Path:
    """The directory of a commit in the cache of the hub's library, which has a file at `path`."""
    return path.parents[file.count("/")]


def _remember(repository: str, revision: str, commit: str) -> None:
    reference = _reference(repository, revision)
    if revision == commit or (reference.is_file() and reference.read_text() == commit):
        return
    with contextlib.suppress(OSError):  # a cache that is read only still gives its copies
        reference.parent.mkdir(parents=True, exist_ok=True)
        replace_file(reference, commit.encode())


def _reference(repository: str, revision: str) -> Path:
    """The file with the commit of a revision."""
    name = f"{_flat(repository)}@{urllib.parse.quote(revision, safe='')}"
    return cache_directory() / "references" / name


def _flat(repository: str) -> str:
    return repository.replace("/", "--")


def download(name: str) -> Path:
    """Downloads a repository's config, tokenizer and the one of its checkpoints that is meant.

    Returns the directory that holds them. Raises `CheckpointError` as `native_copy` does.
    """
    repository, revision = _split(name)
    commit = _commit(repository, revision)
    files = [_fetch(repository, file, commit) for file in _wanted(repository, commit)]
    return files[0].parent


def _download_tokenizer() -> Path:
    """The file of `TOKENIZER_REPOSITORY`. Raises `CheckpointError` as `native_copy` does."""
    name = native_format.TOKENIZER_FILES[0]
    return _fetch(TOKENIZER_REPOSITORY, name, "main")


def download_adapters(name: str) -> Path:
    """Downloads adapters of a repository, or of a folder of one. Returns their directory.

    Raises `CheckpointError` as `native_copy` does.
    """
    repository, folder, revision = _split_folder(name)
    config = folder + peft_files.CONFIG
    commit = _commit(repository, revision, config)
    path = _fetch(repository, config, commit)
    files = _list(repository, commit, _ADAPTERS)
    for weights in (peft_files.WEIGHTS, peft_files.TORCH_WEIGHTS):
        if folder + weights in files:
            _fetch(repository, folder + weights, commit)
            return path.parent
    raise CheckpointError(f"{name} has no {peft_files.WEIGHTS}: it holds no adapters")


def download_files(name: str, files: Sequence[str]) -> Path:
    """Downloads some files of a repository. Returns the directory of its files.

    Raises `CheckpointError` as `native_copy` does.
    """
    repository, revision = _split(name)
    commit = _commit(repository, revision, files[0])
    paths = [_fetch(repository, file, commit) for file in files]
    return _snapshot(paths[0], files[0])


def download_prompts(name: str) -> list[Path]:
    """Downloads the files in a repository's `prompts/`. Raises `CheckpointError`."""
    repository, revision = _split(name)
    commit = _commit(repository, revision)
    files = _list(repository, commit, _PROMPTS)
    return [_fetch(repository, file, commit) for file in files if _PROMPTS.search(file)]


def _list(repository: str, commit: str, wanted: re.Pattern[str]) -> list[str]:
    """The files of a repository; offline those in the cache, if any of them matches `wanted`."""
    try:
        return huggingface_hub.HfApi().list_repo_files(repository, revision=commit)
    except Exception as error:
        snapshot = _snapshot_directory(repository, commit)
        files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
        if not any(wanted.search(file) for file in files):
            raise _unreachable(repository, "the list of files", error) from error
        return files


def _wanted(repository: str, commit: str) -> list[str]:
    """The files of a repository that this package reads, of only one checkpoint if it has more."""
    from csm_jax.convert.weight_files import choose

    files = _list(repository, commit, _WEIGHTS)
    weights = choose(files, lambda file: read_json(_fetch(repository, file, commit)), repository)
    small = native_format.TOKENIZER_FILES + native_format.SMALL_FILES
    # Without weights it is no checkpoint, and what is missing is its config.
    config = ["config.json"] if "config.json" in files or not weights else []
    return config + [file for file in small if file in files] + sorted(weights)


def _fetch(repository: str, file: str, revision: str) -> Path:
    try:
        return _download(repository, file, revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, HfHubHTTPError) and isinstance(error, EntryNotFoundError):
            _check_kind(repository, file, revision)
        raise _unreachable(repository, file, error) from error


def _download(repository: str, file: str, revision: str) -> Path:
    """A file of the hub, in the cache of the hub's library."""
    found = huggingface_hub.hf_hub_download(
        repository, file, revision=revision, cache_dir=_hub_cache()
    )
    return Path(found)


def _snapshot_directory(repository: str, commit: str) -> Path:
    """Where the hub's library keeps the files of a commit."""
    cache = _hub_cache() or Path(constants.HF_HUB_CACHE)
    return cache / f"models--{_flat(repository)}" / "snapshots" / commit


def _hub_cache() -> Path | None:
    """None for huggingface_hub's own cache; it makes a directory `~` for users without a home."""
    return cache_directory() / "hub" if constants.HF_HUB_CACHE.startswith("~") else None


def _check_kind(repository: str, absent: str, revision: str) -> None:
    """Raises `CheckpointError` if a repository has adapters instead of a model, or the reverse.

    Args:
      absent: a file that it does not have.
    """
    try:
        files = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return
    found = sorted(file for file in files if Path(file).name == peft_files.CONFIG)
    places = [str(Path(repository, file).parent) for file in found]
    if absent == "config.json" and found:
        raise peft_files.not_a_checkpoint(
            places[0], read_json(_fetch(repository, found[0], revision))
        )
    if Path(absent).name == peft_files.CONFIG:
        where = Path(repository, absent).parent
        if found:
            raise CheckpointError(f"{where} holds no adapters itself: name {' or '.join(places)}")
        if "config.json" in files:
            raise peft_files.not_adapters(where)


def _unreachable(repository: str, wanted: str, error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return CheckpointError(
        f"{wanted} of {repository} could not be downloaded ({reason}): "
        "check the network and the name, accept the model's terms on its page and log in with "
        "`hf auth login` or HF_TOKEN, or name a local directory instead"
    )
