"""Reads and writes LoRA adapters in PEFT's format, so that either library runs the other's."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from csm_jax.checkpoints.native_format import check_finite
from csm_jax.checkpoints.peft_options import PeftOptions, parse_options
from csm_jax.checkpoints.torch_files import load_tensors, plain_names
from csm_jax.config import CSMConfig, read_json
from csm_jax.errors import CheckpointError
from csm_jax.io.contents import explain
from csm_jax.io.files import new_directory
from csm_jax.model.layers import LowRank
from csm_jax.model.lora import TARGETS, Adapters, LoRAConfig, adapter_shapes, merge

WEIGHTS, TORCH_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_STACKS = {"backbone": "backbone_model", "depth_decoder": "depth_decoder.model"}
# State dicts that were not saved by PEFT have the name of the adapter too, such as "default".
_HALF = re.compile(
    rf"{re.escape(_PREFIX)}(.+)\.lora_(?:embedding_)?([AB])(?:\.(?!weight$)\w+)?(?:\.weight)?"
)
# PEFT copies the head that it adapts, as it is in the base, next to its adapters.
_COPY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.base_layer\.weight")
# Between a bfloat16 and the value that was rounded to it.
_ROUNDING = 2.0**-7

logger = logging.getLogger("csm_jax")


def merge_files(
    tensors: Iterable[tuple[str, np.ndarray]], config: CSMConfig, directory: Path, is_int8: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """`lora.merge` with the adapters in a directory.

    Args:
      is_int8: whether `tensors` are those of an int8 checkpoint.

    Raises:
      CheckpointError: as `read_adapters` does, for an int8 checkpoint, and while it is iterated if
        the adapters are for another model.
    """
    if is_int8:
        raise CheckpointError(
            f"{directory} cannot be added to weights that are stored as int8: use the checkpoint "
            "that they were made from, and --quantize=int8"
        )
    adapters, scale = read_adapters(directory, config)
    return merge(_compared(tensors, config, directory), config, adapters, scale)


def _compared(
    tensors: Iterable[tuple[str, np.ndarray]], config: CSMConfig, directory: Path
) -> Iterator[tuple[str, np.ndarray]]:
    """The same tensors, compared with the copies of the base's that are beside the adapters."""
    modules = _modules(config)
    copies = {
        f"csm/{modules[match[1]]}/weight": tensor
        for name, tensor in _read_tensors(directory).items()
        if (match := _COPY.fullmatch(name)) and match[1] in modules
    }
    for path, tensor in tensors:
        if path in copies and not _is_same(tensor, copies[path]):
            raise CheckpointError(
                f"{directory} was trained on a model with another {path.removeprefix('csm/')}: "
                "name that model as the checkpoint"
            )
        yield path, tensor


def _is_same(tensor: np.ndarray, copy: np.ndarray) -> bool:
    """Whether two tensors differ by rounding at most."""
    if tensor.shape != copy.shape:
        return False
    ours, theirs = (np.asarray(array, np.float32) for array in (tensor, copy))
    return np.allclose(ours, theirs, rtol=_ROUNDING, atol=1e-6)


def is_adapters(directory: Path) -> bool:
    """Whether a directory holds adapters."""
    return (directory / CONFIG).is_file()


def base_name(directory: Path) -> str | None:
    """The name of the model that adapters are of, if they have it."""
    name = _read_config(directory).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def not_a_checkpoint(where: str | Path, config: Mapping[str, Any]) -> CheckpointError:
    """The error of adapters that are named as a checkpoint.

    Args:
      config: the content of their `adapter_config.json`.
    """
    base = config.get("base_model_name_or_path") or "another model"
    return CheckpointError(
        f"{where} holds adapters of {base} and no model: use --adapters={where}, with that model "
        "as the checkpoint"
    )


def not_adapters(where: str | Path) -> CheckpointError:
    """The error of a checkpoint that is named as adapters."""
    return CheckpointError(
        f"{where} holds a whole model and no adapters: name it as the checkpoint"
    )


def write_adapters(
    directory: Path, adapters: Adapters, config: LoRAConfig, base: str, replace: bool = False
) -> None:
    """Writes a directory that PEFT loads too, whole or not at all.

    Args:
      directory, replace: as in `files.new_directory`.
      base: name of the checkpoint that was adapted, as for `csm_jax.load`.

    Raises:
      OutputError: it exists or cannot be written.
    """
    tensors = {}
    for path, low in adapters.items():
        tensors[f"{_PREFIX}{_peft_name(path)}.lora_A.weight"] = np.asarray(low.down)
        tensors[f"{_PREFIX}{_peft_name(path)}.lora_B.weight"] = np.asarray(low.up)
    name, _, revision = (base, "", "") if Path(base).exists() else base.partition("@")
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": name,
        "revision": revision or None,
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

    Updates of other modules, such as the codec's, are left out with a notice if they are zero: a
    list of suffixes like "q_proj" matches them too, and training does not reach them.

    Raises:
      CheckpointError: they are not there, damaged, of another kind, or for another model.
    """
    options = parse_options(_read_config(directory), str(directory / CONFIG))
    tensors = _read_tensors(directory)
    modules = _modules(config)
    halves = _pair(tensors, directory)
    _leave_out({m: pair for m, pair in halves.items() if m not in modules}, directory)
    adapters = {}
    for module in halves.keys() & modules.keys():
        low = halves[module]
        _check_rank(low, options, module, directory)
        # The scale of all updates is one number; those with a scale of their own are multiplied.
        factor = options.scale_of(module) / options.scale
        adapters[modules[module]] = low if factor == 1 else LowRank(low.down, low.up * factor)
    if not adapters:
        raise CheckpointError(f"{directory} has no adapters of projections of this model")
    _check_shapes(adapters, config, directory)
    return adapters, options.scale


def _read_config(directory: Path) -> dict[str, Any]:
    if is_adapters(directory):
        return read_json(directory / CONFIG)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory: name one with {CONFIG}")
    # Runs of `csm_jax.finetune` and of PEFT have them in directories of their own.
    if inside := [str(path) for path in sorted(directory.iterdir()) if is_adapters(path)]:
        raise CheckpointError(f"{directory} holds no adapters itself: name {' or '.join(inside)}")
    if (directory / "config.json").is_file():
        raise not_adapters(directory)
    raise CheckpointError(f"{directory} holds no adapters: {CONFIG} is missing")


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors by the names that PEFT gives them."""
    file = directory / WEIGHTS
    if not file.exists() and (directory / TORCH_WEIGHTS).is_file():
        file = directory / TORCH_WEIGHTS
        tensors = {name: each.float().numpy() for name, each in load_tensors(file).items()}
    else:
        try:
            with safe_open(file, "np") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:
            raise CheckpointError(f"{file} cannot be read: {explain(error, file)}") from error
    return {plain: tensors[name] for plain, name in plain_names(tensors, str(file)).items()}


def _pair(tensors: Mapping[str, np.ndarray], directory: Path) -> dict[str, LowRank]:
    """The update of every module that the file names, float32."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        if _COPY.fullmatch(name):
            continue
        match = _HALF.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{directory}: {name} is no adapter of a projection of this model"
            )
        check_finite(f"{directory}: {name}", tensor)
        if match[2] in (half := halves.setdefault(match[1], {})):
            raise CheckpointError(
                f"{directory} holds several adapters of {match[1]}: save one of them alone"
            )
        half[match[2]] = tensor.astype(np.float32)
    for module, pair in halves.items():
        if len(pair) < 2:
            raise CheckpointError(f"{directory}: half of the adapter of {module} is missing")
    return {module: LowRank(pair["A"], pair["B"]) for module, pair in halves.items()}


def _leave_out(others: Mapping[str, LowRank], directory: Path) -> None:
    """Checks that updates of modules that are not adapted here do nothing, and says so."""
    effective = sorted(m for m, low in others.items() if low.down.any() and low.up.any())
    if effective:
        more = f" and {len(effective) - 1} more modules" if effective[1:] else ""
        raise CheckpointError(
            f"{directory} changes {effective[0]}{more}, but only projections of the backbone and "
            "the depth decoder can have adapters: merge them into their model with PEFT "
            "(merge_and_unload) and convert that model"
        )
    if others:
        logger.warning(
            "%s: the adapters of %d modules such as %s do nothing and are left out",
            directory,
            len(others),
            min(others),
        )


def _check_rank(low: LowRank, options: PeftOptions, module: str, directory: Path) -> None:
    rank = options.rank_of(module)
    if (low.down.shape[:-1], low.up.shape[1:]) != ((rank,), (rank,)):
        raise CheckpointError(
            f"{directory}: the adapter of {module} is {low.up.shape} by {low.down.shape}, but its "
            f"rank is {rank} in {CONFIG}"
        )


def _modules(config: CSMConfig) -> dict[str, str]:
    """Module of transformers' model to path, of every projection."""
    return {_peft_name(path): path for path in adapter_shapes(config, TARGETS)}


def _check_shapes(adapters: Adapters, config: CSMConfig, directory: Path) -> None:
    shapes = adapter_shapes(config, TARGETS)
    for path, (down, up) in adapters.items():
        if (len(up), down.shape[1]) != shapes[path] or up.shape[1] != len(down):
            raise CheckpointError(
                f"{directory}: the adapter of {path} is {up.shape} by {down.shape}, but its "
                f"projection is {shapes[path]}: it is for another model"
            )


def _peft_name(path: str) -> str:
    """The module of transformers' CSM that a path is."""
    if path == "projection":
        return "depth_decoder.model.inputs_embeds_projector"
    if path == "codebook0_head":
        return "lm_head"
    stack, _, layer, block, name = path.split("/")
    block = {"attn": "self_attn", "mlp": "mlp"}[block]
    return f"{_STACKS[stack]}.layers.{layer}.{block}.{name}_proj"
