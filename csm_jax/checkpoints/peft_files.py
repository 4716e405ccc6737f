"""Reads and writes LoRA adapters in PEFT's format, so that either library runs the other's."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from csm_jax.config import CSMConfig, read_json
from csm_jax.errors import CheckpointError, first_line
from csm_jax.io.files import new_directory
from csm_jax.model.layers import LowRank
from csm_jax.model.lora import TARGETS, Adapters, LoRAConfig, adapter_shapes, merge

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_STACKS = {"backbone": "backbone_model", "depth_decoder": "depth_decoder.model"}


def merge_files(
    tensors: Iterable[tuple[str, np.ndarray]], config: CSMConfig, directory: Path, is_int8: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """`lora.merge` with the adapters in a directory.

    Args:
      is_int8: whether `tensors` are those of an int8 checkpoint.

    Raises:
      CheckpointError: as `read_adapters` does, and for an int8 checkpoint.
    """
    if is_int8:
        raise CheckpointError(
            f"{directory} cannot be added to weights that are stored as int8: use the checkpoint "
            "that they were made from, and --quantize=int8"
        )
    return merge(tensors, config, *read_adapters(directory, config))


def write_adapters(
    directory: Path, adapters: Adapters, config: LoRAConfig, base: str, replace: bool = False
) -> None:
    """Writes a directory that PEFT loads too, whole or not at all.

    Args:
      directory, replace: as in `files.new_directory`.
      base: name of the checkpoint that was adapted.

    Raises:
      OutputError: it exists or cannot be written.
    """
    tensors = {}
    for path, low in adapters.items():
        tensors[f"{_PREFIX}{_peft_name(path)}.lora_A.weight"] = np.asarray(low.down)
        tensors[f"{_PREFIX}{_peft_name(path)}.lora_B.weight"] = np.asarray(low.up)
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({_peft_name(path) for path in adapters}),
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    with new_directory(directory, size, replace) as partial:
        (partial / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        (partial / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_adapters(directory: Path, config: CSMConfig) -> tuple[Adapters, float]:
    """Reads what `write_adapters` or PEFT wrote: adapters, and the scale of their updates.

    Raises:
      CheckpointError: they are not there, damaged, of another kind, or for another model.
    """
    values = read_json(directory / CONFIG)
    _check_kind(values, directory)
    try:
        tensors = load_file(directory / WEIGHTS)
    except Exception as error:
        raise CheckpointError(f"{directory / WEIGHTS}: {first_line(error)}") from error
    paths = {_peft_name(path): path for path in adapter_shapes(config, TARGETS)}
    adapters = _pair(tensors, paths, directory)
    _check_shapes(adapters, config, directory)
    rank, alpha = values["r"], values["lora_alpha"]
    return adapters, alpha / (rank**0.5 if values.get("use_rslora") else rank)


def _pair(tensors: Mapping[str, np.ndarray], paths: Mapping[str, str], directory: Path) -> Adapters:
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        # PEFT copies the heads that it adapts, as they are in the base, next to their adapters.
        if name.endswith(".base_layer.weight"):
            continue
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None or match[1] not in paths or tensor.ndim != 2:
            raise CheckpointError(
                f"{directory}: {name} is no adapter of a projection of this model"
            )
        halves.setdefault(paths[match[1]], {})[match[2]] = tensor.astype(np.float32)
    for path, pair in halves.items():
        if len(pair) < 2:
            raise CheckpointError(f"{directory}: half of the adapter of {path} is missing")
    return {path: LowRank(pair["A"], pair["B"]) for path, pair in halves.items()}


def _check_shapes(adapters: Adapters, config: CSMConfig, directory: Path) -> None:
    shapes = adapter_shapes(config, TARGETS)
    for path, (down, up) in adapters.items():
        if (len(up), down.shape[1]) != shapes[path] or up.shape[1] != len(down):
            raise CheckpointError(
                f"{directory}: the adapter of {path} is {up.shape} by {down.shape}, but its "
                f"projection is {shapes[path]}: it is for another model"
            )


def _check_kind(values: Mapping[str, Any], directory: Path) -> None:
    """Raises `CheckpointError` for options that would be ignored."""
    refused = ("use_dora", "alpha_pattern", "rank_pattern", "modules_to_save", "fan_in_fan_out")
    for name in refused:
        if values.get(name):
            raise CheckpointError(f"{directory} has {name}, which is not supported")
    numbers = values.get("r"), values.get("lora_alpha")
    is_plain = values.get("peft_type") == "LORA" and values.get("bias", "none") == "none"
    if not is_plain or not all(
        isinstance(number, int | float) and number > 0 for number in numbers
    ):
        raise CheckpointError(f"{directory / CONFIG} does not describe plain LoRA adapters")


def _peft_name(path: str) -> str:
    """The module of transformers' CSM that a path is."""
    if path == "projection":
        return "depth_decoder.model.inputs_embeds_projector"
    if path == "codebook0_head":
        return "lm_head"
    stack, _, layer, block, name = path.split("/")
    block = {"attn": "self_attn", "mlp": "mlp"}[block]
    return f"{_STACKS[stack]}.layers.{layer}.{block}.{name}_proj"
