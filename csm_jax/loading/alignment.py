"""Where the alignment heads of a checkpoint are: beside its weights, or in the cache."""

import hashlib
from pathlib import Path

from csm_jax.checkpoints import alignment_heads as heads
from csm_jax.checkpoints.alignment_heads import AlignmentHeads
from csm_jax.config import CSMConfig
from csm_jax.errors import OutputError
from csm_jax.io.files import reporting
from csm_jax.loading.hub import cache_directory


def read_alignment(directory: Path | None, config: CSMConfig) -> AlignmentHeads | None:
    """The alignment heads of a checkpoint; None if they have not been found yet.

    Raises:
      CheckpointError: as `heads.read`.
    """
    if directory is None:
        return None
    return heads.read(directory, config) or heads.read(_cached(directory), config)


def keep_alignment(directory: Path, found: AlignmentHeads) -> Path:
    """Writes the alignment heads of a checkpoint, and returns the file.

    It is in the checkpoint's directory, or in the cache if that cannot be written.

    Raises:
      OutputError: the cache cannot be written either.
    """
    try:
        with reporting(f"{directory} cannot be written"):
            return heads.write(directory, found)
    except OutputError:
        cached = _cached(directory)
        with reporting(f"{cached} cannot be written"):
            cached.mkdir(parents=True, exist_ok=True)
            return heads.write(cached, found)


def _cached(directory: Path) -> Path:
    """The directory in the cache that belongs to a checkpoint as it is now."""
    facts = [str(directory.resolve())]
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name != heads.FILE_NAME and not path.name.startswith("."):
            about = path.stat()
            facts.append(f"{path.name} {about.st_size} {about.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_directory() / "alignment" / digest[:32]
