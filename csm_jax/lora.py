"""Low-rank adapters (LoRA, Hu et al., 2021): small updates of some projections.

They are named and stored as Hugging Face's PEFT does with transformers' CSM, so that what is
trained on one side runs on the other. PEFT knows q, k and v as three projections, where this
model has one (`llama.Attention`): an adapter belongs to one of theirs.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save

from csm_jax.config import CSMConfig, LlamaConfig, read_json
from csm_jax.convert.csm import fused_qkv
from csm_jax.errors import CheckpointError, InputError, first_line
from csm_jax.files import new_directory
from csm_jax.layers import LowRank
from csm_jax.model import CSM

Array = jax.Array
Adapters = dict[str, LowRank]  # by path, such as "backbone/layers/0/attn/q"

TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "projection", "codebook0_head")
DEFAULT_TARGETS = TARGETS[:7]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_STACKS = {"backbone": "backbone_model", "depth_decoder": "depth_decoder.model"}
_QKV = ("q", "k", "v")
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRAConfig:
    """Which projections get adapters, and of what kind.

    Attributes:
      rank: of the updates.
      alpha: updates are multiplied by `alpha / rank`.
      targets: of `TARGETS`, in both stacks.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f"the rank of adapters is {self.rank}, but must be at least 1")
        if not self.targets:
            raise InputError(f"adapters have no targets: name some of {', '.join(TARGETS)}")
        for target in self.targets:
            if target not in TARGETS:
                raise InputError(f"{target} is no target of adapters: {', '.join(TARGETS)} are")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def adapter_shapes(config: CSMConfig, targets: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Path to (out, in) of every projection that a target names."""
    wanted = set(targets)
    shapes = {}
    for stack in _STACKS:
        sizes = getattr(config, stack)
        for layer in range(sizes.num_layers):
            for name, shape in _layer_shapes(sizes).items():
                if name.rpartition("/")[2] in wanted:
                    shapes[f"{stack}/layers/{layer}/{name}"] = shape
    embed_dim = config.backbone.embed_dim
    if "projection" in wanted:
        shapes["projection"] = (config.depth_decoder.embed_dim, embed_dim)
    if "codebook0_head" in wanted:
        shapes["codebook0_head"] = (config.audio_vocab_size, embed_dim)
    return shapes


def _layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    dim, mlp = config.embed_dim, config.mlp_dim
    return {
        "attn/q": (query, dim),
        "attn/k": (kv, dim),
        "attn/v": (kv, dim),
        "attn/o": (dim, query),
        "mlp/gate": (mlp, dim),
        "mlp/up": (mlp, dim),
        "mlp/down": (dim, mlp),
    }


def init_adapters(config: CSMConfig, lora: LoRAConfig, seed: int = 0) -> Adapters:
    """New adapters, float32: `down` is random and `up` zero, so that nothing is changed yet."""
    random = np.random.default_rng(seed)
    adapters = {}
    for path, (out, width) in adapter_shapes(config, lora.targets).items():
        # PEFT's own: Kaiming's uniform with a = sqrt(5).
        bound = width**-0.5
        down = random.uniform(-bound, bound, (lora.rank, width)).astype(np.float32)
        adapters[path] = LowRank(down, np.zeros((out, lora.rank), np.float32))
    return adapters


def attach(model: CSM, adapters: Adapters, scale: float) -> None:
    """Lets the projections of a bound model (`model.bind`) add their updates."""
    for path, update in _fused(model.config, adapters).items():
        down, up = update
        module = _module(model, path)
        module.update = nnx.data(
            LowRank(down.astype(model.dtype), (up * scale).astype(model.dtype))
        )


def _module(model: CSM, path: str) -> Any:
    module = model
    for name in path.split("/"):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def _fused(config: CSMConfig, adapters: Adapters) -> Adapters:
    """The same updates for the projections that this model has."""
    fused = {path: low for path, low in adapters.items() if path.rpartition("/")[2] not in _QKV}
    layers = {path.rpartition("/")[0] for path in adapters.keys() - fused.keys()}
    for layer in sorted(layers):
        sizes = getattr(config, layer.partition("/")[0])
        fused[f"{layer}/qkv"] = _fuse_qkv(sizes, {q: adapters.get(f"{layer}/{q}") for q in _QKV})
    return fused


def _fuse_qkv(config: LlamaConfig, parts: Mapping[str, LowRank | None]) -> LowRank:
    """One update with the ranks side by side: rows of q, for one, read the columns of q alone."""
    there = [low for low in parts.values() if low is not None]
    total, before, ups = sum(len(low.down) for low in there), 0, []
    for name in _QKV:
        low, rows = parts[name], _layer_shapes(config)[f"attn/{name}"][0]
        rank = 0 if low is None else len(low.down)
        up = jnp.zeros((rows, 0)) if low is None else low.up
        ups.append(jnp.pad(up, ((0, 0), (before, total - before - rank))))
        before += rank
    (up,) = fused_qkv(config, interleaved=False).forward(*ups)
    return LowRank(jnp.concatenate([low.down for low in there]), up)


def merge(
    tensors: Iterable[tuple[str, np.ndarray]], config: CSMConfig, adapters: Adapters, scale: float
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of all parameters, as of `checkpoint.read_params`, with the updates added."""
    updates = {f"csm/{path}/weight": low for path, low in _fused(config, adapters).items()}
    for path, tensor in tensors:
        if path in updates:
            down, up = (np.asarray(array, np.float32) for array in updates[path])
            tensor = (np.asarray(tensor, np.float32) + scale * (up @ down)).astype(tensor.dtype)
        yield path, tensor


def merged(
    tensors: Iterable[tuple[str, np.ndarray]], config: CSMConfig, directory: Path, is_int8: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """`merge` of the adapters in a directory.

    Raises `CheckpointError` as `read_adapters` does, and for parameters that are int8.
    """
    if is_int8:
        raise CheckpointError(
            f"{directory} cannot be added to weights that are stored as int8: use the checkpoint "
            "that they were made from, and --quantize=int8"
        )
    return merge(tensors, config, *read_adapters(directory, config))


def write_adapters(
    directory: Path, adapters: Adapters, lora: LoRAConfig, base: str, replace: bool = False
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
        tensors[f"{_PEFT_PREFIX}{_peft_name(path)}.lora_A.weight"] = np.asarray(low.down)
        tensors[f"{_PEFT_PREFIX}{_peft_name(path)}.lora_B.weight"] = np.asarray(low.up)
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
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
    rank, alpha = values.get("r"), values.get("lora_alpha")
    return adapters, alpha / (rank**0.5 if values.get("use_rslora") else rank)


def _pair(tensors: Mapping[str, np.ndarray], paths: Mapping[str, str], directory: Path) -> Adapters:
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        # PEFT copies the heads that it adapts, as they are in the base, next to their adapters.
        if name.endswith(".base_layer.weight"):
            continue
        match = re.fullmatch(rf"{re.escape(_PEFT_PREFIX)}(.+)\.lora_([AB])\.weight", name)
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
    """Refuses what would be dropped in silence."""
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
