"""What training starts from: a checkpoint, in the form that a step wants it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from csm_jax import checkpoint, lora
from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.loading import open_source
from csm_jax.lora import LoRAConfig
from csm_jax.mimi.codec import Codec
from csm_jax.model import CSM
from csm_jax.precision import FLOAT32, Precision
from csm_jax.tokenizer import Tokenizer
from csm_jax.train import placement

Params = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A loaded checkpoint.

    Attributes:
      name: as it was asked for.
      params: of the language model, placed; in the types to compute in if they are frozen, else
        float32.
      codec_params: of the codec, on the host.
      small_files: what lies beside the weights and is kept.
    """

    name: str
    config: CSMConfig
    tokenizer: Tokenizer
    codec: Codec
    params: Params
    codec_params: Params
    small_files: list[Path]


def load_base(
    name: str,
    precision: Precision,
    mesh: Mesh | None,
    *,
    frozen: bool,
    adapters: Path | None = None,
    scratch_seed: int | None = None,
) -> Base:
    """Loads what is to be trained.

    Args:
      frozen: whether its parameters stay as they are, as with adapters.
      adapters: some that are added to the weights first.
      scratch_seed: draw the language model anew; None keeps the checkpoint's.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged.
      InputError: its weights are int8, which have no gradient.
    """
    source = open_source(name)
    if source.is_int8:
        raise InputError(
            f"{name} is stored as int8, which cannot be trained: use the checkpoint it was made of"
        )
    tensors = source.tensors
    if adapters is not None:
        tensors = lora.merged(tensors, source.config, adapters, is_int8=False)
    kept = precision if frozen else FLOAT32

    def place(path: str, tensor: np.ndarray | jax.Array) -> jax.Array:
        # The codec's go to the device when the codec is made.
        is_codec = path.startswith("codec/")
        return np.asarray(tensor) if is_codec else placement.place(tensor, mesh)

    params = checkpoint.place_params(tensors, source.config, kept, place)
    if scratch_seed is not None:
        params["csm"] = placement.place(_draw(source.config, scratch_seed), mesh)
    return Base(
        name=name,
        config=source.config,
        tokenizer=source.tokenizer,
        codec=Codec(source.config.codec, params["codec"]),
        params=params["csm"],
        codec_params=params["codec"],
        small_files=checkpoint.small_files(source.directory) if source.directory else [],
    )


def _draw(config: CSMConfig, seed: int) -> Params:
    def init() -> Params:
        return nnx.to_pure_dict(nnx.state(CSM(config, rngs=nnx.Rngs(seed))))

    return jax.device_get(jax.jit(init)())


def new_adapters(base: Base, config: LoRAConfig, seed: int, mesh: Mesh | None) -> lora.Adapters:
    return placement.place(lora.init_adapters(base.config, config, seed), mesh)


def whole_model(base: Base, trained: Any, config: LoRAConfig | None) -> Iterator[tuple[str, Any]]:
    """(path, host array) of all parameters, of the codec too, with what was trained in them.

    Args:
      trained: on the host: parameters, or adapters of the kind `config`.
    """
    csm = trained if config is None else placement.gather(base.params)
    tensors = sorted(checkpoint.flatten({"csm": csm, "codec": base.codec_params}).items())
    if config is None:
        return iter(tensors)
    return lora.merge(tensors, base.config, trained, config.scale)
