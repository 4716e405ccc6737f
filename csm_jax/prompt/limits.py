"""Prompt limits: how long the texts and the contexts are that a checkpoint speaks well.

They are a property of its training data, kept beside its weights as `prompt_limits.json`:

    {"max_part_characters": 60, "context_seconds": 20}
"""

import dataclasses
import json
from pathlib import Path

from csm_jax.config import check_integer, check_number, read_json
from csm_jax.errors import CheckpointError
from csm_jax.io.files import replace_file
from csm_jax.prompt.splitting import MAX_CHARACTERS

FILE_NAME = "prompt_limits.json"


@dataclasses.dataclass(frozen=True)
class PromptLimits:
    """How long the texts and the contexts are that a checkpoint speaks well.

    Attributes:
      max_part_characters: longer texts are split into parts (`splitting.split_text`).
      context_seconds: of the speech before a part that are its context, besides the turns that fix
        voices, if not all fits or the part is not the first of its text (`window.choose_context`).
    """

    max_part_characters: int = MAX_CHARACTERS
    context_seconds: float = 30.0


def read(directory: Path | None) -> PromptLimits:
    """The prompt limits of a checkpoint; the defaults for what its file does not have.

    Raises:
      CheckpointError: the file cannot be read, or has a value that is no limit.
    """
    if directory is None or not (directory / FILE_NAME).is_file():
        return PromptLimits()
    path = directory / FILE_NAME
    values = read_json(path)
    checks = {"max_part_characters": check_integer, "context_seconds": check_number}
    if unknown := values.keys() - checks.keys():
        known = " and ".join(checks)
        raise CheckpointError(f"{path}: unknown key {min(unknown)}; known are {known}")
    return PromptLimits(**{n: checks[n](f"{path}: {n}", value) for n, value in values.items()})


def write(directory: Path, limits: PromptLimits) -> Path:
    """Writes `prompt_limits.json` into a checkpoint's directory, and returns its path."""
    path = directory / FILE_NAME
    replace_file(path, (json.dumps(dataclasses.asdict(limits), indent=2) + "\n").encode())
    return path
