"""Conversion tables of the codec: kyutai's layout and the Hugging Face one.

Layer numbers are the same in both layouts and here; what differs is the order of axes
(convolutions are channels last here) and the form of q, k, v and of the codebooks.
"""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np

from csm_jax.config import MimiConfig
from csm_jax.convert.csm import to_halves, to_pairs
from csm_jax.convert.rules import IDENTITY, Rule, Table, Transform, one_to_one

# Codebook entries that were used less than this are as good as unused (moshi `core_vq.py`).
MIN_USAGE = 1e-5

# torch's [out, in, K] to [K, in, out].
CONV = one_to_one(lambda w: w.transpose(2, 1, 0), lambda w: w.transpose(2, 1, 0))
# A convolution over one input is a projection: [out, in, 1] to [out, in].
POINTWISE = one_to_one(lambda w: w.reshape(w.shape[:2]), lambda w: w[..., None])


def conv_transpose(stride: int) -> Transform:
    """torch's [in, out, M * stride] to [M, in, stride, out], the oldest input first."""

    def forward(weight: Any) -> Any:
        inputs, outputs, size = weight.shape
        taps = weight.reshape(inputs, outputs, size // stride, stride)
        return taps.transpose(2, 0, 3, 1)[::-1]

    def inverse(weight: Any) -> Any:
        taps, inputs, _, outputs = weight.shape
        return weight[::-1].transpose(1, 3, 0, 2).reshape(inputs, outputs, taps * stride)

    return one_to_one(forward, inverse)


def fused_qkv(num_heads: int) -> Transform:
    """kyutai's one [3 * D, D] projection to q, k and v, with RoPE on halves."""

    def forward(weight: Any) -> tuple[Any, ...]:
        query, key, value = weight.reshape(3, -1, weight.shape[-1])
        return to_halves(query, num_heads), to_halves(key, num_heads), value

    def inverse(query: Any, key: Any, value: Any) -> tuple[Any]:
        parts = [to_pairs(query, num_heads), to_pairs(key, num_heads), value]
        return (jnp.concatenate(parts),)

    return Transform(forward, inverse)


def _codebook(total: Any, usage: Any, initialized: Any) -> tuple[Any]:
    # What training keeps: sums of the vectors that fell to an entry, and how many they were.
    total, usage = total.astype(np.float32), usage.astype(np.float32)
    return (total / usage.clip(MIN_USAGE)[:, None],)


def _codebook_inverse(codebook: Any) -> tuple[Any, ...]:
    ones = codebook[:, 0] * 0 + 1
    return codebook, ones, ones[:1]


CODEBOOK = Transform(_codebook, _codebook_inverse)


def kyutai_table(config: MimiConfig, names: Collection[str] = ()) -> Table:
    """Layout 3: `tokenizer-e351c8d8-checkpoint125.safetensors` and what moshi saves.

    Args:
      names: the tensors of the file, which decide between the older and newer names of codebooks;
        without any, the newer ones are expected.
    """

    def spelling(*known: str) -> str:
        found = [s for s in known if any(name.endswith(s) for name in names)]
        return [*found, known[0]][0]

    codebook = (
        spelling("_codebook.embedding_sum", "_codebook.embed_sum", "_codebook.embed_avg"),
        spelling("_codebook.cluster_usage", "_codebook.cluster_size"),
        spelling("_codebook._initialized", "_codebook.inited"),
    )
    rules = [
        *_kyutai_transformer("encoder_transformer", config),
        *_kyutai_transformer("decoder_transformer", config),
        *_convolutions(config, "model", conv="conv.conv", transposed="convtr.convtr"),
        *_resampling(config, "downsample.conv.conv.conv", "upsample.convtr.convtr.convtr"),
        *_quantizer("rvq_first", "semantic", "vq.layers", codebook),
        *_quantizer("rvq_rest", "acoustic", "vq.layers", codebook),
    ]
    return Table("kyutai Mimi", tuple(rules))


def huggingface_table(config: MimiConfig) -> Table:
    """Layout 4: `MimiModel` of transformers, alone or (with a prefix) inside a CSM checkpoint."""
    codebook = tuple(f"codebook.{name}" for name in ("embed_sum", "cluster_usage", "initialized"))
    rules = [
        *_huggingface_transformer("encoder_transformer"),
        *_huggingface_transformer("decoder_transformer"),
        *_convolutions(config, "layers", conv="conv", transposed="conv"),
        *_resampling(config, "downsample.conv", "upsample.conv"),
        *_quantizer("semantic_residual_vector_quantizer", "semantic", "layers", codebook),
        *_quantizer("acoustic_residual_vector_quantizer", "acoustic", "layers", codebook),
    ]
    return Table("Hugging Face Mimi", tuple(rules))


def _convolutions(config: MimiConfig, layers: str, conv: str, transposed: str) -> list[Rule]:
    """Both ends of the codec.

    Layers are named one by one where a kind is not known from a tensor's name.
    """

    def weight_and_bias(theirs: str, ours: str, transform: Transform) -> list[Rule]:
        return [
            Rule(f"{theirs}.weight", f"{ours}/weight", transform),
            Rule(f"{theirs}.bias", f"{ours}/bias"),
        ]

    rules = []
    for end in ("encoder", "decoder"):
        block = f"{end}.{layers}.{{i}}.block.{{j}}.{conv}"
        rules += weight_and_bias(block, f"{end}/layers/{{i}}/layers/{{j}}", CONV)

    stage = 2 + config.num_residual_layers  # the strided layer, its activation, residual blocks
    last = stage * len(config.ratios) + 2
    strided = {2 + stage * i: ratio for i, ratio in enumerate(reversed(config.ratios))}
    rules += [
        rule
        for i in [0, *(stage * (i + 1) for i in range(len(config.ratios))), last]
        for rule in weight_and_bias(f"encoder.{layers}.{i}.{conv}", f"encoder/layers/{i}", CONV)
    ]
    for i in (0, last):
        rules += weight_and_bias(f"decoder.{layers}.{i}.{conv}", f"decoder/layers/{i}", CONV)
    for i, ratio in strided.items():
        theirs = f"decoder.{layers}.{i}.{transposed}"
        rules += weight_and_bias(theirs, f"decoder/layers/{i}", conv_transpose(ratio))
    return rules


def _resampling(config: MimiConfig, downsample: str, upsample: str) -> list[Rule]:
    transposed = conv_transpose(config.downsample_stride)
    return [
        Rule(f"{downsample}.weight", "downsample/weight", CONV),
        Rule(f"{upsample}.weight", "upsample/weight", transposed),
    ]


def _quantizer(theirs: str, ours: str, layers: str, codebook: tuple[str, ...]) -> list[Rule]:
    theirs, ours = f"quantizer.{theirs}", f"quantizer/{ours}"
    sources = tuple(f"{theirs}.{layers}.{{i}}.{name}" for name in codebook)
    return [
        Rule(f"{theirs}.input_proj.weight", f"{ours}/in_proj/weight", POINTWISE),
        Rule(f"{theirs}.output_proj.weight", f"{ours}/out_proj/weight", POINTWISE),
        Rule(sources, f"{ours}/codebooks/{{i}}", CODEBOOK),
    ]


def _kyutai_transformer(name: str, config: MimiConfig) -> list[Rule]:
    theirs = f"{name}.transformer.layers.{{i}}"
    ours = f"{name}/layers/{{i}}"
    # The published file has the first spelling, moshi saves the second.
    fused = tuple(
        f"{theirs}.self_attn.{spelling}" for spelling in ("in_proj_weight", "in_projs.0.weight")
    )
    output = tuple(
        f"{theirs}.self_attn.{spelling}" for spelling in ("out_proj.weight", "out_projs.0.weight")
    )
    qkv = tuple(f"{ours}/{projection}/weight" for projection in "qkv")
    names = {
        "norm1.weight": "attn_norm/scale",
        "norm1.bias": "attn_norm/bias",
        "norm2.weight": "mlp_norm/scale",
        "norm2.bias": "mlp_norm/bias",
        "linear1.weight": "up/weight",
        "linear2.weight": "down/weight",
        "layer_scale_1.scale": "attn_scale",
        "layer_scale_2.scale": "mlp_scale",
    }
    return [
        Rule(fused, qkv, fused_qkv(config.num_heads), alternatives=True),
        Rule(output, f"{ours}/o/weight", IDENTITY, alternatives=True),
        *(Rule(f"{theirs}.{source}", f"{ours}/{target}") for source, target in names.items()),
    ]


def _huggingface_transformer(name: str) -> list[Rule]:
    names = {
        "self_attn.q_proj.weight": "q/weight",
        "self_attn.k_proj.weight": "k/weight",
        "self_attn.v_proj.weight": "v/weight",
        "self_attn.o_proj.weight": "o/weight",
        "input_layernorm.weight": "attn_norm/scale",
        "input_layernorm.bias": "attn_norm/bias",
        "post_attention_layernorm.weight": "mlp_norm/scale",
        "post_attention_layernorm.bias": "mlp_norm/bias",
        "mlp.fc1.weight": "up/weight",
        "mlp.fc2.weight": "down/weight",
        "self_attn_layer_scale.scale": "attn_scale",
        "mlp_layer_scale.scale": "mlp_scale",
    }
    return [
        Rule(f"{name}.layers.{{i}}.{source}", f"{name}/layers/{{i}}/{target}")
        for source, target in names.items()
    ]
