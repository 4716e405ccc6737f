"""Known sizes of the models in the original layout, by their names and by the shapes of tensors."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from csm_jax.config import CSMConfig, LlamaConfig, csm_1b, miso_8b
from csm_jax.convert.rules import Shape
from csm_jax.errors import CheckpointError

# By the flavor of the backbone, on which the form of the prompt depends too.
MODELS = {"llama-1B": csm_1b(), "llama-8B": miso_8b()}
# What `config.json` and the reference code call the two stacks.
FLAVORS = {
    "llama-1B": csm_1b().backbone,
    "llama-100M": csm_1b().depth_decoder,
    "llama-8B": miso_8b().backbone,
    "llama-300M": miso_8b().depth_decoder,
}


class _Sizes(NamedTuple):
    """What the shapes of a stack tell of it; the number of its heads is not among it."""

    num_layers: int
    embed_dim: int
    query_dim: int
    key_dim: int
    mlp_dim: int

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers of {self.embed_dim}, queries of {self.query_dim}, keys of "
            f"{self.key_dim}, MLP {self.mlp_dim}"
        )


def model_of(backbone: LlamaConfig) -> CSMConfig:
    """The known model with a backbone of these sizes; CSM-1B if there is none."""
    for model in MODELS.values():
        if _sizes(model.backbone) == _sizes(backbone):
            return model
    return csm_1b()


def csm_from_shapes(name: str, shapes: Mapping[str, Shape]) -> CSMConfig:
    """The config of a checkpoint in the original layout, whose two stacks are known flavors.

    Args:
      name: of the checkpoint, for the error.
      shapes: of its tensors.

    Raises:
      CheckpointError: a stack has other sizes, or a tensor is missing.
    """
    try:
        backbone, depth_decoder = (_measure(shapes, stack) for stack in ("backbone", "decoder"))
        text, audio = shapes["text_embeddings.weight"], shapes["codebook0_head.weight"]
        num_codebooks = shapes["audio_head"].shape[0] + 1
    except KeyError as error:
        raise CheckpointError(f"{name} lacks tensor {error.args[0]}") from None
    known = {_sizes(config): config for config in FLAVORS.values()}
    if unknown := [sizes for sizes in (backbone, depth_decoder) if sizes not in known]:
        raise CheckpointError(
            f"{name} has a stack of unknown sizes ({unknown[0]}), and no config.json that tells "
            "its heads: give the sizes with --config"
        )
    return dataclasses.replace(
        model_of(known[backbone]),
        backbone=known[backbone],
        depth_decoder=known[depth_decoder],
        text_vocab_size=text.shape[0],
        audio_vocab_size=audio.shape[0],
        num_codebooks=num_codebooks,
    )


def _sizes(config: LlamaConfig) -> _Sizes:
    return _Sizes(
        config.num_layers,
        config.embed_dim,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.mlp_dim,
    )


def _measure(shapes: Mapping[str, Shape], stack: str) -> _Sizes:
    first = f"{stack}.layers.0"
    numbers = {key.split(".")[2] for key in shapes if key.startswith(f"{stack}.layers.")}
    mlp_dim, embed_dim = shapes[f"{first}.mlp.w1.weight"].shape
    query_dim, key_dim = (shapes[f"{first}.attn.{name}_proj.weight"].shape[0] for name in "qk")
    return _Sizes(len(numbers), embed_dim, query_dim, key_dim, mlp_dim)
