"""Voices as data: turns that fix a voice, and what the backbone has computed for them.

A file of a voice is one of safetensors: numbers and JSON, which run no code. It has the keys and
values of every layer, the codes of the turns, and a manifest that says which model they belong to.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from csm_jax.config import CSMConfig
from csm_jax.errors import CheckpointError, InputError, first_line
from csm_jax.io.files import replace_file, reporting
from csm_jax.model.kv_cache import KVCache, LayerCache
from csm_jax.prompt.turns import Segment

FORMAT, VERSION = "csm-jax voice", 1


@dataclass(frozen=True)
class ModelIdentity:
    """What keys and values depend on, besides the turns.

    Attributes:
      checkpoint: the name that the model was loaded by.
      config: its sizes.
      precision: the types that it is held and computed in.
      weights: a digest of a sample of every parameter.
    """

    checkpoint: str
    config: CSMConfig
    precision: str
    weights: str

    def find_difference(self, other: "ModelIdentity") -> str | None:
        """What makes the keys and values of another model others; None if nothing does."""
        if self.config != other.config:
            return f"whose sizes are not those of {other.checkpoint}"
        if self.precision != other.precision:
            return f"in {self.precision}, not in {other.precision}"
        if self.weights != other.weights:
            return f"whose weights are not those of {other.checkpoint}"
        return None


class VoiceLayer(NamedTuple):
    """Keys (already rotated) and values of one layer, [K, H, T] each, in host memory."""

    key: np.ndarray
    value: np.ndarray


@dataclass(frozen=True, eq=False)
class Voice:
    """The turns at the beginning of a prompt, with the keys and values that they lead to.

    `Generator.make_voice` and `mix_voices` make one; `Request.voice` takes it.

    Attributes:
      turns: with codes, and without audio.
      layers: of the backbone, in the type of its cache.
      model: the model that computed them.
      is_mixed: whether they are of several voices; `turns` are then of the first one.
    """

    turns: tuple[Segment, ...]
    layers: tuple[VoiceLayer, ...]
    model: ModelIdentity
    is_mixed: bool = False

    @property
    def num_positions(self) -> int:
        """Positions of the turns."""
        return self.layers[0].key.shape[2]

    @functools.cached_property
    def digest(self) -> bytes:
        """Voices with the same one have the same keys and values."""
        digest = hashlib.sha256(self.model.weights.encode())
        for array in (array for layer in self.layers for array in layer):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.digest()

    def check_room(self, num_positions: int, window: int) -> None:
        """Raises `InputError` if the voice has no place in a prompt.

        Args:
          num_positions: that its turns take there; 0 if there is no room for them.
          window: positions of the prompt and of the speech.
        """
        if not num_positions:
            raise InputError(
                f"the voice takes {self.num_positions} of {window} positions, which leaves no room "
                "for the text and its speech: make it of a shorter recording"
            )
        if num_positions != self.num_positions:
            raise InputError(
                f"the voice has keys of {self.num_positions} positions, but its turns take "
                f"{num_positions}: make it again"
            )

    def check(self, model: ModelIdentity) -> None:
        """Raises `CheckpointError` if the voice is one of another model."""
        if difference := self.model.find_difference(model):
            raise CheckpointError(
                f"the voice was made with {self.model.checkpoint}, {difference}: load that model "
                "in the same precision, or make the voice again"
            )

    def place(self, length: int) -> KVCache:
        """The keys and values on the device, one row padded to so many positions."""
        padding = ((0, 0), (0, 0), (0, length - self.num_positions))

        def pad(array: np.ndarray) -> jax.Array:
            return jax.device_put(np.pad(array, padding)[None])

        layers = [LayerCache(pad(layer.key), pad(layer.value)) for layer in self.layers]
        lengths = jax.device_put(np.full(1, self.num_positions, np.int32))
        return KVCache(tuple(layers), lengths)

    def save(self, path: str | Path) -> None:
        """Writes the voice to a file (`.safetensors`), whole or not at all.

        Raises:
          OutputError: it cannot be written.
        """
        tensors = {}
        for index, layer in enumerate(self.layers):
            tensors[f"layers.{index}.key"] = np.ascontiguousarray(layer.key)
            tensors[f"layers.{index}.value"] = np.ascontiguousarray(_by_position(layer.value))
        for index, turn in enumerate(self.turns):
            tensors[f"turns.{index}.codes"] = np.asarray(turn.codes, np.int32)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "checkpoint": self.model.checkpoint,
            "config": self.model.config.to_dict(),
            "precision": self.model.precision,
            "weights": self.model.weights,
            "is_mixed": self.is_mixed,
            "turns": [{"speaker": turn.speaker, "text": turn.text} for turn in self.turns],
        }
        path = Path(path)
        with reporting(f"{path} could not be written"):
            replace_file(path, save(tensors, {"manifest": json.dumps(manifest)}))

    @classmethod
    def load(cls, path: str | Path) -> "Voice":
        """Reads a file that `save` wrote; nothing in it is run.

        Raises:
          InputError: there is no such file, or it is none of a voice.
        """
        try:
            with safe_open(path, "np") as opened:
                manifest = json.loads((opened.metadata() or {})["manifest"])
                # safetensors' object has no iterator.
                tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
            return _read(manifest, tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is no voice of csm_jax ({first_line(error)})") from error


def _read(manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Voice:
    """A voice of what a file has. Raises `KeyError`, `TypeError` and `ValueError`."""
    if manifest["format"] != FORMAT or manifest["version"] != VERSION:
        raise ValueError(f"{manifest['format']} {manifest['version']}, expected {FORMAT} {VERSION}")
    config = CSMConfig.from_dict(manifest["config"])
    layers = tuple(
        VoiceLayer(tensors[f"layers.{index}.key"], _by_position(tensors[f"layers.{index}.value"]))
        for index in range(config.backbone.num_layers)
    )
    _check_shapes(layers, config)
    turns = tuple(
        Segment(turn["speaker"], turn["text"], codes=tensors[f"turns.{index}.codes"], pinned=True)
        for index, turn in enumerate(manifest["turns"])
    )
    identity = ModelIdentity(
        manifest["checkpoint"], config, manifest["precision"], manifest["weights"]
    )
    return Voice(turns, layers, identity, bool(manifest["is_mixed"]))


def _check_shapes(layers: tuple[VoiceLayer, ...], config: CSMConfig) -> None:
    heads, dim = config.backbone.num_kv_heads, config.backbone.head_dim
    expected = heads, dim, layers[0].key.shape[-1]
    for layer in layers:
        if layer.key.shape != expected or layer.value.shape != expected:
            raise ValueError(f"keys of shape {layer.key.shape}, values of {layer.value.shape}")


def _by_position(values: np.ndarray) -> np.ndarray:
    """Values [K, H, T] as files have them, [K, T, H]; or the reverse."""
    return values.swapaxes(1, 2)
