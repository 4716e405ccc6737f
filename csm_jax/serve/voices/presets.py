"""The voices that come with a checkpoint: recordings in its directory `prompts`."""

import logging
import shutil
from pathlib import Path

from csm_jax.errors import CheckpointError, OutputError
from csm_jax.io.files import make_once, new_directory
from csm_jax.loading import hub

# Transcripts of the recordings that Sesame has published, which are not in their repository.
# Source: `SPEAKER_PROMPTS` of the model's space on the Hugging Face hub.
TRANSCRIPTS = Path(__file__).with_name("transcripts")

logger = logging.getLogger("csm_jax.serve")


def find_presets(checkpoint: str, directory: Path | None) -> list[Path]:
    """Directories of voices that come with a checkpoint.

    Those of a hub repository are downloaded once, into its native copy. Without a network the
    server starts without them.

    Args:
      checkpoint: the name that was passed to `csm_jax.load`.
      directory: of the checkpoint; None for random weights.
    """
    if directory is None:
        return []
    prompts = directory / "prompts"
    if not prompts.is_dir() and hub.is_name(checkpoint) and not Path(checkpoint).is_dir():
        _download(checkpoint, prompts)
    return [prompts] if prompts.is_dir() else []


def _download(repository: str, target: Path) -> None:
    """Makes the directory `target` atomically: recordings, and a transcript beside each."""

    def make() -> None:
        recordings = hub.download_prompts(repository)
        with new_directory(target) as made:
            for recording in recordings:
                shutil.copy(recording, made)
                _add_transcript(made / recording.name)

    try:
        make_once(target, target.is_dir, make)
    except (CheckpointError, OutputError) as error:
        logger.warning("the voices of %s are not there: %s", repository, error)


def _add_transcript(recording: Path) -> None:
    known, beside = (
        directory / f"{recording.stem}.txt" for directory in (TRANSCRIPTS, recording.parent)
    )
    if known.is_file() and not beside.exists():
        shutil.copy(known, beside)
