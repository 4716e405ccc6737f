"""The checkpoint that training starts from, with its parameters in the types that a step needs."""

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from csm_jax.checkpoints import native_format
from csm_jax.checkpoints.quantize import prepare
from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.loading import open_source
from csm_jax.mimi.codec import Codec
from csm_jax.model import lora
from csm_jax.model.csm import CSM
from csm_jax.model.layers import Params
from csm_jax.model.lora import Adapters, LoRAConfig
from csm_jax.model.precision import FLOAT32, Precision
from csm_jax.prompt.tokenizer import Tokenizer
from csm_jax.train import fsdp
from csm_jax.train.parts import PARTS, split


@dataclass(frozen=True)
class PretrainedModel:
    """A checkpoint that is loaded for training.

    Attributes:
      name: what it was loaded by.
      params: of the language model, on the mesh; float32 of the parts that are trained, else in the
        types to compute in.
      trained: the parts that are trained; none with adapters.
      codec_params: of the codec, in host memory.
      small_files: files beside the weights, which are copied to the result.
    """

    name: str
    config: CSMConfig
    tokenizer: Tokenizer
    codec: Codec
    params: Params
    codec_params: Params
    small_files: list[Path]
    trained: frozenset[str]

    @property
    def frozen(self) -> Params:
        """The parameters of the parts that are not trained."""
        return split(self.params, self.trained)[1]


def load_pretrained(
    name: str,
    precision: Precision,
    mesh: Mesh | None,
    *,
    trained: Collection[str] = PARTS,
    adapters: str | Path | None = None,
    scratch_seed: int | None = None,
) -> PretrainedModel:
    """Loads a checkpoint to train.

    Args:
      trained: the parts (of `parts.PARTS`) that are trained; none if adapters are.
      adapters: older ones, which are merged into the weights first.
      scratch_seed: draws new weights for the language model; None keeps the checkpoint's weights.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
      InputError: its weights are int8, which have no gradient.
    """
    source = open_source(name, adapters)
    if source.is_int8:
        raise InputError(
            f"{name} is stored as int8, which cannot be trained: use the checkpoint it was made of"
        )

    def place(path: str, tensor: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        # The codec's go to the device when the codec is made.
        return np.asarray(tensor) if path.startswith("codec/") else fsdp.shard(tensor, mesh)

    flat = {}
    for path, tensor in source.tensors:
        held = FLOAT32 if path.split("/")[1] in trained else _frozen(precision, trained)
        flat |= prepare(path, place(path, tensor), held)
    params = native_format.unflatten(flat, native_format.param_shapes(source.config))
    if scratch_seed is not None:
        params["csm"] = fsdp.shard(_initialize(source.config, scratch_seed), mesh)
    return PretrainedModel(
        name=name,
        config=source.config,
        tokenizer=source.tokenizer,
        codec=Codec(source.config.codec, params["codec"]),
        params=params["csm"],
        codec_params=params["codec"],
        small_files=native_format.small_files(source.directory) if source.directory else [],
        trained=frozenset(trained),
    )


def _frozen(precision: Precision, trained: Collection[str]) -> Precision:
    """How parameters are held that are not trained."""
    # They are a part of the result beside trained ones, where bits would be none.
    return dataclasses.replace(precision, packs_tables=False) if trained else precision


def _initialize(config: CSMConfig, seed: int) -> Params:
    def init() -> Params:
        return nnx.to_pure_dict(nnx.state(CSM(config, rngs=nnx.Rngs(seed))))

    return jax.device_get(jax.jit(init)())


def new_adapters(
    pretrained: PretrainedModel, config: LoRAConfig, seed: int, mesh: Mesh | None
) -> Adapters:
    """Adapters that change nothing yet, on the mesh."""
    return fsdp.shard(lora.init_adapters(pretrained.config, config, seed), mesh)


def merge_trained(
    pretrained: PretrainedModel, trained: Params, config: LoRAConfig | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, host array) of every parameter of the trained model and of its codec.

    Args:
      trained: in host memory: the parts that are trained, or adapters of the kind `config`.
    """
    csm = fsdp.gather(pretrained.frozen)
    if config is None:
        csm |= trained
    tensors = sorted(native_format.flatten({"csm": csm, "codec": pretrained.codec_params}).items())
    if config is None:
        return iter(tensors)
    return lora.merge(tensors, pretrained.config, trained, config.scale)
