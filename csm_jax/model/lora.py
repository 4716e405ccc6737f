"""Low-rank adapters (LoRA, Hu et al., 2021): small updates of some projections.

Adapters are those of Hugging Face's PEFT (`peft_files.py` reads and writes its files). PEFT knows
q, k and v as three projections, where this model has one (`qkv.py`): an adapter belongs to one of
the three.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from csm_jax.config import CSMConfig, LlamaConfig
from csm_jax.errors import InputError
from csm_jax.model import qkv
from csm_jax.model.csm import CSM
from csm_jax.model.layers import LowRank

Adapters = dict[str, LowRank]  # by path, such as "backbone/layers/0/attn/q"

TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "projection", "codebook0_head")
DEFAULT_TARGETS = TARGETS[:7]
_STACKS = ("backbone", "depth_decoder")
# The parts of the model that have such projections.
PARTS = (*_STACKS, "projection", "codebook0_head")
_QKV = ("q", "k", "v")


@dataclass(frozen=True)
class LoRAConfig:
    """The projections that get adapters, and their size.

    Attributes:
      rank: of every update.
      alpha: updates are multiplied by `alpha / rank`.
      targets: of `TARGETS`, in both stacks.
      parts: of `PARTS`, where the targets have adapters.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    parts: tuple[str, ...] = PARTS

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

    @property
    def adapted_parts(self) -> frozenset[str]:
        """The parts that do have adapters."""
        has_stacks = any(target in DEFAULT_TARGETS for target in self.targets)
        targeted = {*self.targets, *(_STACKS if has_stacks else ())}
        return frozenset(targeted.intersection(self.parts))


def adapter_shapes(
    config: CSMConfig, targets: Iterable[str], parts: Collection[str] = PARTS
) -> dict[str, tuple[int, int]]:
    """Path to (out, in) of every projection in these parts that a target names."""
    wanted = set(targets)
    shapes = {}
    for stack in (name for name in _STACKS if name in parts):
        sizes = getattr(config, stack)
        for layer in range(sizes.num_layers):
            for name, shape in _layer_shapes(sizes).items():
                if name.rpartition("/")[2] in wanted:
                    shapes[f"{stack}/layers/{layer}/{name}"] = shape
    embed_dim = config.backbone.embed_dim
    if "projection" in wanted & set(parts):
        shapes["projection"] = (config.depth_decoder.embed_dim, embed_dim)
    if "codebook0_head" in wanted & set(parts):
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
    """New adapters, float32: `down` is random and `up` zero, so that the model is unchanged."""
    random = np.random.default_rng(seed)
    adapters = {}
    for path, (out, width) in adapter_shapes(config, lora.targets, lora.parts).items():
        # PEFT's own: Kaiming's uniform with a = sqrt(5).
        bound = width**-0.5
        down = random.uniform(-bound, bound, (lora.rank, width)).astype(np.float32)
        adapters[path] = LowRank(down, np.zeros((out, lora.rank), np.float32))
    return adapters


def attach(model: CSM, adapters: Adapters, scale: float) -> None:
    """Adds the updates to the projections of a bound model (`csm.bind`)."""
    for path, update in _fused(model.config, adapters).items():
        down, up = update
        module = _module(model, path)
        module.update = nnx.data(
            LowRank(down.astype(model.dtype), (up * scale).astype(model.dtype))
        )


def _module(module: Any, path: str) -> Any:
    for name in path.split("/"):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def _fused(config: CSMConfig, adapters: Adapters) -> Adapters:
    """The same updates, those of q, k and v joined into updates of the fused projection."""
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
        up = jnp.zeros((rows, 0), jnp.float32) if low is None else low.up
        ups.append(jnp.pad(up, ((0, 0), (before, total - before - rank))))
        before += rank
    query, key, value = ups
    up = qkv.fuse(query, key, value, config)
    return LowRank(jnp.concatenate([low.down for low in there]), up)


def merge(
    tensors: Iterable[tuple[str, np.ndarray]], config: CSMConfig, adapters: Adapters, scale: float
) -> Iterator[tuple[str, np.ndarray]]:
    """All parameters as (path, array), like `native_format.read_params`, with the updates added."""
    updates = {f"csm/{path}/weight": low for path, low in _fused(config, adapters).items()}
    for path, tensor in tensors:
        if path in updates:
            down, up = (np.asarray(array, np.float32) for array in updates[path])
            tensor = (np.asarray(tensor, np.float32) + scale * (up @ down)).astype(tensor.dtype)
        yield path, tensor
