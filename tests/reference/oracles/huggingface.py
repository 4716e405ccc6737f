"""The CSM of transformers, with its Mimi codec: checkpoint layout 2."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.initialization import no_init_weights

from csm_jax.config import CSMConfig, LlamaConfig, MimiConfig, RopeScaling
from oracles.prompts import Prompt, audio_rows, concatenate
from oracles.random_weights import randomize

# Tiny sizes make transformers warn about token ids and RoPE lengths.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

AUDIO_TABLES = {
    "backbone": "backbone_model.embed_tokens.embed_audio_tokens.weight",
    "depth_decoder": "depth_decoder.model.embed_tokens.weight",
}


def hf_config(config: CSMConfig) -> transformers.CsmConfig:
    """The config of the same model in transformers."""
    ids = config.text_token_ids
    return transformers.CsmConfig(
        **_hf_llama_fields(config.backbone),
        num_codebooks=config.num_codebooks,
        vocab_size=config.audio_vocab_size,
        text_vocab_size=config.text_vocab_size,
        pad_token_id=ids.audio,
        bos_token_id=ids.bos,
        audio_token_id=ids.audio,
        audio_eos_token_id=ids.audio_eos,
        codebook_pad_token_id=config.audio_vocab_size - 1,
        codebook_eos_token_id=0,
        depth_decoder_config=transformers.CsmDepthDecoderConfig(
            **_hf_llama_fields(config.depth_decoder),
            num_codebooks=config.num_codebooks,
            vocab_size=config.audio_vocab_size,
            backbone_hidden_size=config.backbone.embed_dim,
        ),
        codec_config=hf_codec_config(config.codec),
    )


def hf_codec_config(config: MimiConfig) -> transformers.MimiConfig:
    return transformers.MimiConfig(
        sampling_rate=config.sample_rate,
        audio_channels=config.channels,
        hidden_size=config.embed_dim,
        num_filters=config.num_filters,
        num_residual_layers=config.num_residual_layers,
        upsampling_ratios=list(reversed(config.ratios)),
        kernel_size=config.kernel_size,
        last_kernel_size=config.last_kernel_size,
        residual_kernel_size=config.residual_kernel_size,
        dilation_growth_rate=config.dilation_growth,
        compress=config.compress,
        codebook_size=config.codebook_size,
        codebook_dim=config.codebook_dim,
        vector_quantization_hidden_dimension=config.codebook_dim,
        num_quantizers=config.num_codebooks,
        num_semantic_quantizers=config.num_semantic_codebooks,
        upsample_groups=config.embed_dim,
        num_hidden_layers=config.num_layers,
        intermediate_size=config.mlp_dim,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
        sliding_window=config.attention_window,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )


def _hf_llama_fields(config: LlamaConfig) -> dict:
    return {
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _hf_rope_parameters(config.rope_theta, config.rope_scaling),
    }


def _hf_rope_parameters(theta: float, scaling: RopeScaling | None) -> dict:
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }


def hf_model(config: CSMConfig, seed: int = 0) -> transformers.CsmForConditionalGeneration:
    """A model with random weights (see `randomize`); its two audio tables are one tensor."""
    with no_init_weights():  # its own initialization takes a minute at full size
        model = transformers.CsmForConditionalGeneration(hf_config(config)).eval()
    model.tie_weights()
    randomize(model, seed)
    backbone, depth_decoder = (model.get_parameter(name) for name in AUDIO_TABLES.values())
    assert backbone is depth_decoder
    return model


def save_hf(
    model: transformers.CsmForConditionalGeneration,
    directory: Path | str,
    max_shard_size: str | None = None,
    hub_names: bool = False,
    audio_tables: Sequence[str] | None = None,
) -> Path:
    """Writes layout 2 with `save_pretrained` and returns the directory.

    One `model.safetensors`, or shards of at most `max_shard_size` ("200KB") with an index.
    `hub_names` gives the files their names in `sesame/csm-1b`, where they are beside
    layout 1: `transformers-0000X-of-0000Y.safetensors`, `transformers.safetensors.index.json`.
    `audio_tables`, one of `AUDIO_TABLES`, is where the tied audio table is stored; without it
    `save_pretrained` chooses. With shards it must be None.
    """
    directory = Path(directory)
    model.save_pretrained(directory, max_shard_size=max_shard_size or "50GB")
    if audio_tables is not None:
        _store_audio_tables(directory / "model.safetensors", audio_tables)
    if hub_names:
        _rename_to_hub(directory)
    return directory


def _store_audio_tables(file: Path, audio_tables: Sequence[str]) -> None:
    tensors = load_file(file)
    stored = [tensors.pop(name, None) for name in AUDIO_TABLES.values()]
    table = next(tensor for tensor in stored if tensor is not None)
    copies = {AUDIO_TABLES[where]: table.clone() for where in audio_tables}
    save_file(tensors | copies, file, metadata={"format": "pt"})


def _rename_to_hub(directory: Path) -> None:
    index_file = directory / "model.safetensors.index.json"
    if index_file.exists():
        index = json.loads(index_file.read_text())
        index_file.unlink()
    else:
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
        names = load_file(directory / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    for shard in directory.glob("model-*.safetensors"):
        shard.rename(shard.with_name(shard.name.replace("model", "transformers", 1)))
    index["weight_map"] = {
        name: shard.replace("model", "transformers", 1)
        for name, shard in index["weight_map"].items()
    }
    renamed = directory / "transformers.safetensors.index.json"
    renamed.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def hf_embed(model: transformers.CsmForConditionalGeneration, prompt: Prompt) -> torch.Tensor:
    """[T, Q + 1] -> [T, D], as transformers merges text and audio rows."""
    frames, mask = (torch.as_tensor(x) for x in prompt)
    text = model.embed_text_tokens(frames[:, -1].long())
    audio = model.backbone_model.embed_tokens(frames[None, :, :-1].long())[0]
    return torch.where(mask[:, -1:].bool(), text, audio)


@torch.no_grad()
def hf_hidden(model: transformers.CsmForConditionalGeneration, prompt: Prompt) -> torch.Tensor:
    """Backbone output after its last norm, at every position: [T, D]."""
    embeds = hf_embed(model, prompt)[None]
    return model.backbone_model(inputs_embeds=embeds).last_hidden_state[0]


@torch.no_grad()
def hf_logits(model: transformers.CsmForConditionalGeneration, prompt: Prompt) -> torch.Tensor:
    """Logits of codebook 0 at every position: [T, V]."""
    return model(inputs_embeds=hf_embed(model, prompt)[None]).logits[0]


@torch.no_grad()
def hf_attention(model: transformers.CsmForConditionalGeneration, prompt: Prompt) -> torch.Tensor:
    """Attention of all heads of the backbone, layer by layer: [layers * heads, T, T].

    Only the implementation "eager" returns it: `model.set_attn_implementation("eager")`.
    """
    embeds = hf_embed(model, prompt)[None]
    outputs = model.backbone_model(inputs_embeds=embeds, output_attentions=True)
    return torch.cat(outputs.attentions, dim=1)[0]


@torch.no_grad()
def hf_depth_logits(
    model: transformers.CsmForConditionalGeneration, hidden: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Teacher-forced logits of codebooks 1..Q-1: hidden [B, D], codes [B, Q] -> [B, Q - 1, V]."""
    hidden, codes = torch.as_tensor(hidden), torch.as_tensor(codes).long()
    # Position 0 holds a placeholder that transformers replaces by the hidden state.
    input_ids = nn.functional.pad(codes[:, :-1], (1, 0))
    return model.depth_decoder(input_ids=input_ids, backbone_last_hidden_state=hidden).logits


@torch.no_grad()
def greedy_margin(
    model: transformers.CsmForConditionalGeneration, prompt: Prompt, codes: torch.Tensor
) -> float:
    """The smallest lead of a chosen code over the next best, over a greedy run [F, Q].

    A parity test on codes is meaningful only while rounding errors stay below it.
    """
    codes = torch.as_tensor(codes).long()
    spoken = concatenate([prompt, audio_rows(codes)])
    hidden = hf_hidden(model, spoken)[len(prompt[0]) - 1 : -1]
    first_logits = model.lm_head(hidden)[:, None]
    logits = torch.cat([first_logits, hf_depth_logits(model, hidden, codes)], dim=1)
    assert torch.equal(logits.argmax(-1), codes)
    best, second = logits.topk(2).values.unbind(-1)
    return (best - second).min().item()


def hf_greedy(
    model: transformers.CsmForConditionalGeneration, prompt: Prompt, num_frames: int
) -> torch.Tensor:
    """Greedy codes by `model.generate`: [F, Q], F < num_frames only after an end-of-speech frame.

    transformers ends on a frame whose codebooks 0..Q-2 are 0 and returns that frame.
    """
    return hf_greedy_batch(model, [prompt], num_frames)[0]


@torch.no_grad()
def hf_greedy_batch(
    model: transformers.CsmForConditionalGeneration, prompts: Sequence[Prompt], num_frames: int
) -> torch.Tensor:
    """`hf_greedy` of a ragged batch, padded on the left: [B, F, Q].

    Generation continues until every row has ended; frames after the end of a row are arbitrary.
    """
    embeds = [hf_embed(model, prompt) for prompt in prompts]
    longest = max(len(rows) for rows in embeds)
    pads = [longest - len(rows) for rows in embeds]
    inputs_embeds = torch.stack(
        [nn.functional.pad(rows, (0, 0, pad, 0)) for rows, pad in zip(embeds, pads, strict=True)]
    )
    attention_mask = torch.arange(longest)[None] >= torch.tensor(pads)[:, None]
    return _hf_generate(
        model,
        num_frames,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask.long(),
    )


@torch.no_grad()
def hf_greedy_from_audio(
    model: transformers.CsmForConditionalGeneration,
    input_ids: torch.Tensor,
    waveforms: Sequence[torch.Tensor],
    num_frames: int,
) -> torch.Tensor:
    """Greedy codes [F, Q] of a chat prompt whose audio transformers encodes itself.

    `input_ids` [T] holds one audio id per frame of `waveforms` ([num_samples] each, in order) and
    one audio_eos id after each; `frames_from_ids` is the same prompt as frames.
    """
    waveforms = [torch.as_tensor(waveform) for waveform in waveforms]
    ends = torch.tensor([len(waveform) for waveform in waveforms]).cumsum(0)
    input_ids = torch.as_tensor(input_ids).long()[None]
    return _hf_generate(
        model,
        num_frames,
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        input_values=torch.cat(waveforms)[None, None],
        input_values_cutoffs=ends[None],
    )[0]


def _hf_generate(
    model: transformers.CsmForConditionalGeneration, num_frames: int, **inputs
) -> torch.Tensor:
    return model.generate(
        **inputs, do_sample=False, depth_decoder_do_sample=False, max_new_tokens=num_frames
    )


@torch.no_grad()
def hf_encode(
    model: transformers.CsmForConditionalGeneration, waveform: torch.Tensor
) -> torch.Tensor:
    """Mimi codes of a mono waveform: [num_samples] -> [F, Q]."""
    return model.codec_model.encode(torch.as_tensor(waveform)[None, None]).audio_codes[0].T


@torch.no_grad()
def hf_decode(model: transformers.CsmForConditionalGeneration, codes: torch.Tensor) -> torch.Tensor:
    """The waveform of Mimi codes: [F, Q] -> [num_samples]."""
    codes = torch.as_tensor(codes).long()
    return model.codec_model.decode(codes.T[None]).audio_values[0, 0]


@torch.no_grad()
def hf_code_margin(
    model: transformers.CsmForConditionalGeneration, waveform: torch.Tensor
) -> float:
    """The smallest lead of a nearest centroid over the next, as a distance, over all codes."""
    codec = model.codec_model
    latents = codec.encoder(torch.as_tensor(waveform)[None, None]).latents
    margins = []
    for group in ("semantic", "acoustic"):
        quantizer = getattr(codec.quantizer, f"{group}_residual_vector_quantizer")
        residual = quantizer.input_proj(latents)[0].T
        for layer in quantizer.layers:
            distances = torch.cdist(residual, layer.codebook.embed)
            nearest, second = distances.topk(2, largest=False).values.unbind(-1)
            margins.append((second - nearest).min())
            residual = residual - layer.codebook.embed[distances.argmin(-1)]
    return torch.stack(margins).min().item()
