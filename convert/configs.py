"""Configs of the published layouts, to and from ours.

transformers stores the RoPE scaling of CSM in other numbers than Meta's (original length 1024
with factors 0.125 and 0.5 instead of 8192 with 1 and 4), which are the same thresholds: only
`original / low` and `original / high` matter. Each set is read whole.
"""

import math
from typing import Any

from csm_jax.config import (
    CSMConfig,
    LlamaConfig,
    MimiConfig,
    RopeScaling,
    TextTokenIds,
    csm_1b,
)
from csm_jax.errors import CheckpointError

Json = dict[str, Any]

# The flavors that the original `config.json` names instead of sizes.
_FLAVORS = {"llama-1B": csm_1b().backbone, "llama-100M": csm_1b().depth_decoder}


def csm_from_flavors(values: Json) -> CSMConfig:
    """The original layout's config, which names `llama-1B` and `llama-100M`.

    Raises `CheckpointError` for other flavors or a missing size.
    """
    names = [str(values.get(name)) for name in ("backbone_flavor", "decoder_flavor")]
    unknown = [name for name in names if name not in _FLAVORS]
    if unknown:
        raise CheckpointError(
            f"config.json names the flavor {unknown[0]}, but only {', '.join(_FLAVORS)} have "
            "known sizes: give the sizes with --config"
        )
    return CSMConfig(
        backbone=_FLAVORS[names[0]],
        depth_decoder=_FLAVORS[names[1]],
        codec=MimiConfig(),
        text_vocab_size=_required(values, "text_vocab_size"),
        audio_vocab_size=_required(values, "audio_vocab_size"),
        num_codebooks=_required(values, "audio_num_codebooks"),
    )


def _required(values: Json, name: str) -> Any:
    if name not in values:
        raise CheckpointError(f"config.json lacks {name}")
    return values[name]


def csm_from_huggingface(values: Json) -> CSMConfig:
    """`config.json` of a transformers CSM checkpoint, old or new.

    Raises `CheckpointError` for a value that is not supported.
    """
    defaults = csm_1b()
    depth = values.get("depth_decoder_config") or {}
    _expect(values, "tie_codebooks_embeddings", True)
    ids = TextTokenIds()
    return CSMConfig(
        backbone=_llama_from_huggingface(values, defaults.backbone),
        depth_decoder=_llama_from_huggingface(depth, defaults.depth_decoder),
        codec=mimi_from_huggingface(values.get("codec_config") or {}),
        text_vocab_size=values.get("text_vocab_size", defaults.text_vocab_size),
        audio_vocab_size=values.get("vocab_size", defaults.audio_vocab_size),
        num_codebooks=values.get("num_codebooks", defaults.num_codebooks),
        text_token_ids=TextTokenIds(
            bos=values.get("bos_token_id", ids.bos),
            # CSM's own config leaves the text EOS unset: it is not where generation stops.
            eos=_first(values.get("eos_token_id")) or values.get("bos_token_id", ids.bos) + 1,
            audio=values.get("audio_token_id", ids.audio),
            audio_eos=_first(values.get("audio_eos_token_id")) or ids.audio_eos,
        ),
    )


def _first(value: int | list[int] | None) -> int | None:
    return value[0] if isinstance(value, list) else value


def _llama_from_huggingface(values: Json, defaults: LlamaConfig) -> LlamaConfig:
    _expect(values, "attention_bias", False)
    _expect(values, "mlp_bias", False)
    _expect(values, "hidden_act", "silu")
    embed_dim = values.get("hidden_size", defaults.embed_dim)
    num_heads = values.get("num_attention_heads", defaults.num_heads)
    theta, scaling = _rope_from_huggingface(values, defaults.rope_theta)
    return LlamaConfig(
        num_layers=values.get("num_hidden_layers", defaults.num_layers),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads") or num_heads,
        head_dim=values.get("head_dim") or embed_dim // num_heads,
        mlp_dim=values.get("intermediate_size", defaults.mlp_dim),
        max_seq_len=values.get("max_position_embeddings", defaults.max_seq_len),
        norm_eps=values.get("rms_norm_eps", defaults.norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _rope_from_huggingface(values: Json, theta: float) -> tuple[float, RopeScaling | None]:
    """Newer configs have `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.get("rope_theta", values.get("rope_theta", theta))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"config.json has RoPE of type {kind}; default and llama3 are known")
    return theta, RopeScaling(
        factor=_required(rope, "factor"),
        low_freq_factor=_required(rope, "low_freq_factor"),
        high_freq_factor=_required(rope, "high_freq_factor"),
        original_max_seq_len=_required(rope, "original_max_position_embeddings"),
    )


def mimi_from_huggingface(values: Json) -> MimiConfig:
    """`config.json` of a transformers Mimi checkpoint, or the `codec_config` of a CSM one.

    Raises `CheckpointError` for a value that is not supported.
    """
    for name, only in _MIMI_FIXED.items():
        _expect(values, name, only)
    own = {
        ours: values[theirs]
        for ours, theirs in _MIMI_NAMES.items()
        if values.get(theirs) is not None
    }
    ratios = tuple(reversed(values.get("upsampling_ratios") or (8, 6, 5, 4)))
    theta, _ = _rope_from_huggingface(values, MimiConfig.rope_theta)
    config = MimiConfig(**own, ratios=ratios, rope_theta=theta, **_downsampling(values, ratios))
    _expect(values, "num_key_value_heads", config.num_heads)
    _expect(values, "head_dim", config.head_dim)
    _expect(values, "upsample_groups", config.embed_dim)
    _expect(values, "vector_quantization_hidden_dimension", config.codebook_dim)
    return config


def _downsampling(values: Json, ratios: tuple[int, ...]) -> Json:
    """Older configs store the frame rate, from which the last stride follows."""
    frame_rate = values.get("frame_rate") or values.get("_frame_rate")
    if frame_rate is None:
        return {}
    sample_rate = values.get("sampling_rate", MimiConfig.sample_rate)
    return {"downsample_stride": round(sample_rate / math.prod(ratios) / frame_rate)}


_MIMI_NAMES = {
    "sample_rate": "sampling_rate",
    "channels": "audio_channels",
    "num_filters": "num_filters",
    "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "num_residual_layers": "num_residual_layers",
    "dilation_growth": "dilation_growth_rate",
    "compress": "compress",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "attention_window": "sliding_window",
    "norm_eps": "norm_eps",
    "num_codebooks": "num_quantizers",
    "num_semantic_codebooks": "num_semantic_quantizers",
    "codebook_size": "codebook_size",
    "codebook_dim": "codebook_dim",
}
_MIMI_FIXED = {
    "use_causal_conv": True,
    "use_conv_shortcut": False,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "hidden_act": "gelu",
    "attention_bias": False,
}


def _expect(values: Json, name: str, only: Any) -> None:
    if values.get(name, only) not in (only, None):
        raise CheckpointError(f"config.json has {name}={values[name]}; only {only} is supported")


def csm_to_huggingface(config: CSMConfig) -> Json:
    """The `config.json` that `CsmForConditionalGeneration.from_pretrained` reads."""
    ids = config.text_token_ids
    depth = _llama_to_huggingface(config.depth_decoder) | {
        "model_type": "csm_depth_decoder_model",
        "backbone_hidden_size": config.backbone.embed_dim,
        "num_codebooks": config.num_codebooks,
        "vocab_size": config.audio_vocab_size,
    }
    return _llama_to_huggingface(config.backbone) | {
        "architectures": ["CsmForConditionalGeneration"],
        "model_type": "csm",
        "num_codebooks": config.num_codebooks,
        "vocab_size": config.audio_vocab_size,
        "text_vocab_size": config.text_vocab_size,
        "tie_codebooks_embeddings": True,
        "bos_token_id": ids.bos,
        "eos_token_id": None,
        "pad_token_id": ids.audio,
        "audio_token_id": ids.audio,
        "audio_eos_token_id": ids.audio_eos,
        "codebook_eos_token_id": 0,
        "codebook_pad_token_id": config.audio_vocab_size - 1,
        "depth_decoder_config": depth,
        "codec_config": _mimi_to_huggingface(config.codec),
    }


def _llama_to_huggingface(config: LlamaConfig) -> Json:
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope_to_huggingface(config),
    }


def _rope_to_huggingface(config: LlamaConfig) -> Json:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    # transformers wants the original length under the maximum length, so all three numbers are
    # scaled together, as in the published config.
    original = min(scaling.original_max_seq_len, config.max_seq_len // 2)
    ratio = original / scaling.original_max_seq_len
    return {
        "rope_type": "llama3",
        "rope_theta": config.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor * ratio,
        "high_freq_factor": scaling.high_freq_factor * ratio,
        "original_max_position_embeddings": original,
    }


def _mimi_to_huggingface(config: MimiConfig) -> Json:
    own = {theirs: getattr(config, ours) for ours, theirs in _MIMI_NAMES.items()}
    return own | {
        "model_type": "mimi",
        "upsampling_ratios": list(reversed(config.ratios)),
        "frame_rate": config.sample_rate / config.frame_size,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.head_dim,
        "upsample_groups": config.embed_dim,
        "vector_quantization_hidden_dimension": config.codebook_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **_MIMI_FIXED,
    }
