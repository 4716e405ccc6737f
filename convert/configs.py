"""Configs of the published layouts, to and from ours.

transformers stores the RoPE scaling of CSM in other numbers than Meta's (original length 1024
with factors 0.125 and 0.5 instead of 8192 with 1 and 4), which are the same thresholds: only
`original / low` and `original / high` matter. Each set is read whole.
"""

import dataclasses
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
from csm_jax.convert.flavors import FLAVORS, model_of
from csm_jax.convert.section import Section
from csm_jax.errors import CheckpointError

Json = dict[str, Any]

# Of our own, kept by transformers; written where they are not those of CSM-1B.
_PROMPT_NAMES = ("space_after_speaker", "default_max_audio_length_ms")


def csm_from_published(values: Json) -> CSMConfig | None:
    """The sizes in a published `config.json`, as numbers or as flavors; None if it has none.

    Raises:
      CheckpointError: as `csm_from_huggingface` and `csm_from_flavors`.
    """
    # Numbers first: a fine-tune may have a flavor of its own beside them.
    if "depth_decoder_config" in values:
        return csm_from_huggingface(values)
    return csm_from_flavors(values) if "backbone_flavor" in values else None


def csm_from_flavors(values: Json) -> CSMConfig:
    """The original layout's config, which names flavors such as `llama-1B` and `llama-100M`.

    Raises:
      CheckpointError: another flavor, or a size that is missing or of a wrong type.
    """
    file = Section(values)
    names = [file.string(name, "None") for name in ("backbone_flavor", "decoder_flavor")]
    unknown = [name for name in names if name not in FLAVORS]
    if unknown:
        raise CheckpointError(
            f"config.json names the flavor {unknown[0]}, but only {', '.join(FLAVORS)} have "
            "known sizes: give the sizes with --config"
        )
    backbone, depth_decoder = (FLAVORS[name] for name in names)
    return dataclasses.replace(
        model_of(backbone),
        backbone=backbone,
        depth_decoder=depth_decoder,
        text_vocab_size=file.integer("text_vocab_size"),
        audio_vocab_size=file.integer("audio_vocab_size"),
        num_codebooks=file.integer("audio_num_codebooks"),
    )


def csm_from_huggingface(values: Json) -> CSMConfig:
    """`config.json` of a transformers CSM checkpoint, old or new.

    Raises:
      CheckpointError: a value is of a wrong type, or is one that this model does not have.
    """
    file, defaults, ids = Section(values), csm_1b(), TextTokenIds()
    file.expect("tie_codebooks_embeddings", True)
    file.expect("codebook_eos_token_id", 0)
    file.refuse(
        "quantization_config",
        "its weights are quantized, which is not supported: use the model that it was made from, "
        "and --quantize=int8",
    )
    bos = file.token_id("bos_token_id", ids.bos)
    backbone = _llama_from_huggingface(file, defaults.backbone)
    prompt = model_of(backbone)
    return CSMConfig(
        backbone=backbone,
        depth_decoder=_llama_from_huggingface(
            file.section("depth_decoder_config"), defaults.depth_decoder
        ),
        codec=_mimi_from_section(file.section("codec_config")),
        text_vocab_size=file.integer("text_vocab_size", defaults.text_vocab_size),
        # The second name is the original layout's, of files that have both.
        audio_vocab_size=file.integer(
            "vocab_size", file.integer("audio_vocab_size", defaults.audio_vocab_size)
        ),
        num_codebooks=file.integer(
            "num_codebooks", file.integer("audio_num_codebooks", defaults.num_codebooks)
        ),
        text_token_ids=TextTokenIds(
            bos=bos,
            # CSM's own config leaves the text EOS unset: it is not where generation stops.
            eos=file.token_id("eos_token_id", bos + 1),
            audio=file.token_id("audio_token_id", ids.audio),
            audio_eos=file.token_id("audio_eos_token_id", ids.audio_eos),
        ),
        space_after_speaker=file.boolean("space_after_speaker", prompt.space_after_speaker),
        default_max_audio_length_ms=file.integer(
            "default_max_audio_length_ms", prompt.default_max_audio_length_ms
        ),
    )


def _llama_from_huggingface(values: Section, defaults: LlamaConfig) -> LlamaConfig:
    values.expect("attention_bias", False)
    values.expect("mlp_bias", False)
    values.expect("hidden_act", "silu")
    embed_dim = values.integer("hidden_size", defaults.embed_dim)
    num_heads = values.integer("num_attention_heads", defaults.num_heads)
    theta, scaling = _rope_from_huggingface(values, defaults.rope_theta)
    return LlamaConfig(
        num_layers=values.integer("num_hidden_layers", defaults.num_layers),
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=values.integer("num_key_value_heads", num_heads),
        head_dim=values.integer("head_dim", embed_dim // num_heads),
        mlp_dim=values.integer("intermediate_size", defaults.mlp_dim),
        max_seq_len=values.integer("max_position_embeddings", defaults.max_seq_len),
        norm_eps=values.number("rms_norm_eps", defaults.norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _rope_from_huggingface(values: Section, theta: float) -> tuple[float, RopeScaling | None]:
    """Newer configs have `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    values.expect("partial_rotary_factor", 1.0)
    theta = values.number("rope_theta", theta)
    forms = {
        _rope_parameters(section, theta)
        for name in ("rope_scaling", "rope_parameters")
        for section in _rope_sections(values.section(name))
    }
    if len(forms) > 1:
        raise CheckpointError(
            "config.json has several different settings of RoPE; all attention here has the same: "
            "remove those that do not apply"
        )
    return forms.pop() if forms else (theta, None)


def _rope_sections(rope: Section) -> list[Section]:
    """The settings themselves: the section, or those of the layer types that it is nested by."""
    nested = rope.nested(_LAYER_TYPES)
    if nested:
        rope.allow(_LAYER_TYPES, "RoPE of layer types")
        return nested
    return [rope] if rope else []


def _rope_parameters(rope: Section, theta: float) -> tuple[float, RopeScaling | None]:
    kind = rope.string("rope_type", rope.string("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"config.json has RoPE of type {kind}; default and llama3 are known")
    rope.expect("partial_rotary_factor", 1.0)
    rope.allow(_ROPE_NAMES | (_LLAMA3_NAMES if kind == "llama3" else set()), f"RoPE of type {kind}")
    theta = rope.number("rope_theta", theta)
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_seq_len=rope.integer("original_max_position_embeddings"),
    )


def mimi_from_huggingface(values: Json) -> MimiConfig:
    """`config.json` of a transformers Mimi checkpoint.

    Raises:
      CheckpointError: a value is of a wrong type, or is one that this codec does not have.
    """
    return _mimi_from_section(Section(values))


def _mimi_from_section(values: Section) -> MimiConfig:
    for name, only in _MIMI_FIXED.items():
        values.expect(name, only)
    defaults = MimiConfig()
    own = {
        ours: values.integer(theirs, getattr(defaults, ours))
        for ours, theirs in _MIMI_NAMES.items()
        if ours != "norm_eps"
    }
    ratios = tuple(reversed(values.integers("upsampling_ratios", defaults.ratios[::-1])))
    theta, scaling = _rope_from_huggingface(values, defaults.rope_theta)
    if scaling is not None:
        raise CheckpointError("config.json has scaled RoPE in the codec, which is not supported")
    config = MimiConfig(
        **own,
        norm_eps=values.number("norm_eps", defaults.norm_eps),
        ratios=ratios,
        rope_theta=theta,
        downsample_stride=_downsampling(values, ratios),
    )
    values.expect("num_key_value_heads", config.num_heads)
    values.expect("head_dim", config.head_dim)
    values.expect("upsample_groups", config.embed_dim)
    values.expect("vector_quantization_hidden_dimension", config.codebook_dim)
    return config


def _downsampling(values: Section, ratios: tuple[int, ...]) -> int:
    """Older configs store the frame rate, from which the last stride follows."""
    default = MimiConfig.downsample_stride
    name = "frame_rate" if "frame_rate" in values else "_frame_rate"
    if name not in values:
        return default
    frame_rate = values.number(name)
    sample_rate = values.integer("sampling_rate", MimiConfig.sample_rate)
    stride = sample_rate / math.prod(ratios) / frame_rate
    if stride < 1 or abs(stride - round(stride)) > 1e-3:
        raise CheckpointError(
            f"config.json has {name}={frame_rate}, which is no whole fraction of "
            f"{sample_rate / math.prod(ratios):g} Hz, the rate of the codec's transformers"
        )
    return round(stride)


_LAYER_TYPES = ("full_attention", "sliding_attention")
_ROPE_NAMES = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LLAMA3_NAMES = {
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}
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


def csm_to_huggingface(config: CSMConfig) -> Json:
    """The `config.json` that `CsmForConditionalGeneration.from_pretrained` reads."""
    ids, usual = config.text_token_ids, csm_1b()
    prompt = {
        name: getattr(config, name)
        for name in _PROMPT_NAMES
        if getattr(config, name) != getattr(usual, name)
    }
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
        **prompt,
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
