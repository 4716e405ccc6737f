"""Conversion tables of the language model: the original layout and the Hugging Face one."""

from typing import Any

from csm_jax.config import LlamaConfig
from csm_jax.convert.rules import Rule, Table, Transform, one_to_one


def interleaved_to_halves(heads: int) -> Transform:
    """Reorders the rows of a q or k projection [heads * H, D].

    The original rotates the pairs (2i, 2i + 1) of a head, we rotate (i, i + H/2), as Hugging Face
    does: the same rotation after moving even rows to the first half.
    """

    def forward(weight: Any) -> Any:
        pairs = weight.reshape(heads, -1, 2, weight.shape[-1])  # [heads, H/2, 2, D]
        return pairs.swapaxes(1, 2).reshape(weight.shape)

    def inverse(weight: Any) -> Any:
        halves = weight.reshape(heads, 2, -1, weight.shape[-1])
        return halves.swapaxes(1, 2).reshape(weight.shape)

    return one_to_one(forward, inverse)


# The heads are stored [Q - 1, D, V] and used as h @ W; ours are [Q - 1, V, D] like all weights.
HEADS = one_to_one(lambda w: w.swapaxes(1, 2), lambda w: w.swapaxes(1, 2))


def sesame_table(backbone: LlamaConfig, depth_decoder: LlamaConfig) -> Table:
    """Layout 1: `model.safetensors` or `ckpt.pt` of SesameAILabs/csm, torchtune names."""
    rules = [
        Rule("text_embeddings.weight", "text_embedding"),
        Rule("audio_embeddings.weight", "audio_embedding"),
        Rule("projection.weight", "projection/weight"),
        Rule("codebook0_head.weight", "codebook0_head/weight"),
        Rule("audio_head", "depth_heads", HEADS),
        *_torchtune_stack("backbone.", "backbone/", backbone),
        *_torchtune_stack("decoder.", "depth_decoder/", depth_decoder),
    ]
    # Masks that `setup_caches` registers as buffers; a model saved after generating has them.
    ignore = ("backbone_causal_mask", "decoder_causal_mask")
    return Table("Sesame", tuple(rules), ignore)


def _torchtune_stack(source: str, target: str, config: LlamaConfig) -> list[Rule]:
    names = {
        "attn.v_proj.weight": ("attn/v/weight", None),
        "attn.output_proj.weight": ("attn/o/weight", None),
        "mlp.w1.weight": ("mlp/gate/weight", None),
        "mlp.w2.weight": ("mlp/down/weight", None),
        "mlp.w3.weight": ("mlp/up/weight", None),
        "sa_norm.scale": ("attn_norm/scale", None),
        "mlp_norm.scale": ("mlp_norm/scale", None),
        "attn.q_proj.weight": ("attn/q/weight", interleaved_to_halves(config.num_heads)),
        "attn.k_proj.weight": ("attn/k/weight", interleaved_to_halves(config.num_kv_heads)),
    }
    layers = [
        Rule(f"{source}layers.{{i}}.{theirs}", f"{target}layers/{{i}}/{ours}", *filter(None, [t]))
        for theirs, (ours, t) in names.items()
    ]
    return [*layers, Rule(f"{source}norm.scale", f"{target}norm/scale")]


def huggingface_table() -> Table:
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
        Rule("depth_decoder.codebooks_head.weight", "depth_heads", HEADS),
        *_transformers_stack("backbone_model.", "backbone/"),
        *_transformers_stack("depth_decoder.model.", "depth_decoder/"),
    ]
    # Index buffers that older versions of transformers saved.
    ignore = ("backbone_model.embed_tokens.audio_tokens_offsets",)
    return Table("Hugging Face", tuple(rules), ignore)


def _transformers_stack(source: str, target: str) -> list[Rule]:
    names = {
        "self_attn.q_proj.weight": "attn/q/weight",
        "self_attn.k_proj.weight": "attn/k/weight",
        "self_attn.v_proj.weight": "attn/v/weight",
        "self_attn.o_proj.weight": "attn/o/weight",
        "mlp.gate_proj.weight": "mlp/gate/weight",
        "mlp.up_proj.weight": "mlp/up/weight",
        "mlp.down_proj.weight": "mlp/down/weight",
        "input_layernorm.weight": "attn_norm/scale",
        "post_attention_layernorm.weight": "mlp_norm/scale",
    }
    layers = [
        Rule(f"{source}layers.{{i}}.{theirs}", f"{target}layers/{{i}}/{ours}")
        for theirs, ours in names.items()
    ]
    return [*layers, Rule(f"{source}norm.weight", f"{target}norm/scale")]
