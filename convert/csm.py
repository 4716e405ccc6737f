"""Conversion tables of the language model: the original layout and the Hugging Face one."""

from typing import Any

from csm_jax.config import LlamaConfig
from csm_jax.convert.rules import Rule, Table, Transform, one_to_one
from csm_jax.model import qkv


def fused_qkv(config: LlamaConfig, interleaved: bool) -> Transform:
    """Three projections to one (`qkv.fuse`).

    Args:
      interleaved: the source rotates the pairs (2i, 2i + 1) of a head, where we rotate
        (i, i + H/2) as Hugging Face does: the same rotation after moving even rows to the front.
    """

    def forward(q: Any, k: Any, v: Any) -> list[Any]:
        if interleaved:
            q, k = to_halves(q, config.num_heads), to_halves(k, config.num_kv_heads)
        return [qkv.fuse(q, k, v, config)]

    def inverse(fused: Any) -> list[Any]:
        q, k, v = qkv.split(fused, config)
        if interleaved:
            q, k = to_pairs(q, config.num_heads), to_pairs(k, config.num_kv_heads)
        return [q, k, v]

    return Transform(forward, inverse)


def to_halves(weight: Any, heads: int) -> Any:
    """Reorders the rows [heads * H, D] of rotated pairs (2i, 2i + 1) to (i, i + H/2)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])  # [heads, H/2, 2, D]
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def to_pairs(weight: Any, heads: int) -> Any:
    """The reverse of `to_halves`."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


# The heads are stored [Q - 1, D, V] and used as h @ W; ours are [Q - 1, V, D] like all weights.
HEADS = one_to_one(lambda w: w.swapaxes(1, 2), lambda w: w.swapaxes(1, 2))


def sesame_table(backbone: LlamaConfig, depth_decoder: LlamaConfig) -> Table:
    """Layout 1: `model.safetensors` or `ckpt.pt` of SesameAILabs/csm, torchtune names."""
    rules = [
        Rule("text_embeddings.weight", "text_embedding"),
        Rule("audio_embeddings.weight", "audio_embedding"),
        Rule("projection.weight", "projection/weight"),
        Rule("codebook0_head.weight", "codebook0_head/weight"),
        Rule("audio_head", "depth_heads/weight", HEADS),
        *_torchtune_stack("backbone.", "backbone/", backbone),
        *_torchtune_stack("decoder.", "depth_decoder/", depth_decoder),
    ]
    # Masks that `setup_caches` registers as buffers; a model saved after generating has them.
    ignore = ("backbone_causal_mask", "decoder_causal_mask")
    return Table("Sesame", tuple(rules), ignore)


def _torchtune_stack(source: str, target: str, config: LlamaConfig) -> list[Rule]:
    names = {
        "attn.output_proj.weight": "attn/o/weight",
        "mlp.w1.weight": "mlp/gate/weight",
        "mlp.w2.weight": "mlp/down/weight",
        "mlp.w3.weight": "mlp/up/weight",
        "sa_norm.scale": "attn_norm/scale",
        "mlp_norm.scale": "mlp_norm/scale",
    }
    projections = tuple(f"attn.{name}_proj.weight" for name in "qkv")
    fused = fused_qkv(config, interleaved=True)
    return [
        *_layer_rules(
            f"{source}layers.{{i}}.", f"{target}layers/{{i}}/", names, projections, fused
        ),
        Rule(f"{source}norm.scale", f"{target}norm/scale"),
    ]


def _layer_rules(
    source: str, target: str, names: dict[str, str], qkv: tuple[str, ...], fused: Transform
) -> list[Rule]:
    """The rules of one layer: `names` as they are, and the three projections as one."""
    rules = [Rule(source + theirs, target + ours) for theirs, ours in names.items()]
    return [*rules, Rule(tuple(source + q for q in qkv), f"{target}attn/qkv/weight", fused)]


def huggingface_table(backbone: LlamaConfig, depth_decoder: LlamaConfig) -> Table:
    """Layout 2: `CsmForConditionalGeneration` of transformers, without its codec."""
    # One table under one name or both; transformers writes the first.
    tied = (
        "depth_decoder.model.embed_tokens.weight",
        "backbone_model.embed_tokens.embed_audio_tokens.weight",
    )
    rules = [
        Rule("embed_text_tokens.weight", "text_embedding"),
        Rule(tied, "audio_embedding", alternatives=True),
        Rule("lm_head.weight", "codebook0_head/weight"),
        Rule("depth_decoder.model.inputs_embeds_projector.weight", "projection/weight"),
        Rule("depth_decoder.codebooks_head.weight", "depth_heads/weight", HEADS),
        *_transformers_stack("backbone_model.", "backbone/", backbone),
        *_transformers_stack("depth_decoder.model.", "depth_decoder/", depth_decoder),
    ]
    # Index buffers that older versions of transformers save.
    ignore = ("backbone_model.embed_tokens.audio_tokens_offsets",)
    return Table("Hugging Face", tuple(rules), ignore)


def _transformers_stack(source: str, target: str, config: LlamaConfig) -> list[Rule]:
    names = {
        "self_attn.o_proj.weight": "attn/o/weight",
        "mlp.gate_proj.weight": "mlp/gate/weight",
        "mlp.up_proj.weight": "mlp/up/weight",
        "mlp.down_proj.weight": "mlp/down/weight",
        "input_layernorm.weight": "attn_norm/scale",
        "post_attention_layernorm.weight": "mlp_norm/scale",
    }
    projections = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
    fused = fused_qkv(config, interleaved=False)
    return [
        *_layer_rules(
            f"{source}layers.{{i}}.", f"{target}layers/{{i}}/", names, projections, fused
        ),
        Rule(f"{source}norm.weight", f"{target}norm/scale"),
    ]
