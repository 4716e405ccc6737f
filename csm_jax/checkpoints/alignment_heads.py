"""Alignment heads: which attention heads of a checkpoint follow its speech.

They are a property of a checkpoint, kept beside its weights as `alignment.json`:

    {"heads": [[5, 5]], "lags": [0.1, 0.23, 0.06], "masses": [0.6, 0.9], "source": "..."}
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from csm_jax.config import CSMConfig, read_json
from csm_jax.errors import CheckpointError
from csm_jax.io.files import replace_file
from csm_jax.model.llama import Head

FILE_NAME = "alignment.json"


@dataclasses.dataclass(frozen=True)
class AlignmentHeads:
    """The heads whose attention follows the text, as calibration found them.

    Attributes:
      heads: (layer, query head) of the backbone.
      lags: seconds from the frame at which the attention moves to a word until the word starts,
        by the word's place in the text; the last one holds for all further words.
      masses: how much of the attention lies on a word while it is spoken, typically; in the same
        way, by its place.
      source: what they were calibrated with.
    """

    heads: tuple[Head, ...]
    lags: tuple[float, ...]
    masses: tuple[float, ...]
    source: str = ""

    def lag(self, word: int) -> float:
        """The lag of a word, by its place in the text."""
        return self.lags[min(word, len(self.lags) - 1)]

    def mass(self, word: int) -> float:
        """The typical attention to a word, by its place in the text."""
        return self.masses[min(word, len(self.masses) - 1)]


def read(directory: Path | None, config: CSMConfig) -> AlignmentHeads | None:
    """The alignment heads of a checkpoint; None if it has no file of them.

    Raises:
      CheckpointError: the file cannot be read, or names heads that the model does not have.
    """
    if directory is None or not (directory / FILE_NAME).is_file():
        return None
    path = directory / FILE_NAME
    values = read_json(path)
    unknown = values.keys() - {field.name for field in dataclasses.fields(AlignmentHeads)}
    if unknown:
        raise CheckpointError(f"{path}: unknown key {min(unknown)}; calibrate the checkpoint again")
    heads: Any = values.get("heads")
    if not _are_heads(heads, config):
        raise CheckpointError(
            f"{path}: heads are {json.dumps(heads)}, but must be [layer, head] pairs of "
            f"{config.backbone.num_layers} layers with {config.backbone.num_heads} heads"
        )
    return AlignmentHeads(
        tuple((layer, head) for layer, head in heads),
        _numbers(path, values, "lags", -1.0),
        _numbers(path, values, "masses", 0.01),
        str(values.get("source", "")),
    )


def write(directory: Path, found: AlignmentHeads) -> Path:
    """Writes `alignment.json` into a checkpoint's directory, and returns its path."""
    path = directory / FILE_NAME
    replace_file(path, (json.dumps(dataclasses.asdict(found), indent=2) + "\n").encode())
    return path


def _are_heads(heads: Any, config: CSMConfig) -> bool:
    def is_head(pair: Any) -> bool:
        if not isinstance(pair, list) or [type(n) for n in pair] != [int, int]:
            return False
        layer, head = pair
        return 0 <= layer < config.backbone.num_layers and 0 <= head < config.backbone.num_heads

    return isinstance(heads, list) and bool(heads) and all(map(is_head, heads))


def _numbers(path: Path, values: dict[str, Any], name: str, least: float) -> tuple[float, ...]:
    numbers = values.get(name)

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and least <= value <= 1

    if not (isinstance(numbers, list) and numbers and all(map(is_number, numbers))):
        raise CheckpointError(
            f"{path}: {name} are {json.dumps(numbers)}, but must be numbers from {least} to 1"
        )
    return tuple(map(float, numbers))
