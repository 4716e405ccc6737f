"""The two public torch implementations of CSM as oracles, built with random weights at any size.

- `hf_*`: `transformers.CsmForConditionalGeneration`, checkpoint layout 2, with its Mimi codec.
- `SesameModel`: the model of SesameAILabs/csm (`models.py`) assembled from the same torchtune
  parts, checkpoint layout 1, without a codec.

`sesame_from_hf` gives both the same weights. Everything is float32 on the CPU, in eval mode.

A prompt is a pair `(frames, mask)`: int64 and bool arrays [T, Q + 1], whose columns are Q audio
codes and then one text id. The mask of a row is true for its text column or for its Q audio
columns. Functions take torch tensors or numpy arrays and return torch tensors.

Axes: B batch, T positions, F frames, Q codebooks, D backbone dim, V audio vocabulary.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torchtune import modules as tune
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules.common_utils import local_kv_cache
from transformers.initialization import no_init_weights

from csm_jax.config import CSMConfig, LlamaConfig, MimiConfig, RopeScaling

# Tiny sizes make transformers warn about token ids and RoPE lengths.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

Prompt = tuple[torch.Tensor, torch.Tensor]

AUDIO_TABLES = {
    "backbone": "backbone_model.embed_tokens.embed_audio_tokens.weight",
    "depth_decoder": "depth_decoder.model.embed_tokens.weight",
}


# --- Random weights -----------------------------------------------------------------------------

# Larger than fan-in scaling, so that attention is peaked and an error in RoPE shows.
_QUERY_GAIN = 2.0
# A trained model does not predict the ids above the codec's codebook: neither do these heads.
_UNKNOWN_CODE_GAIN = 0.1
_LAYER_SCALE = 0.3
# About the size of the random codec's projected latents, so that all codes are in use.
_CENTROID_SCALE = 0.4


@torch.no_grad()
def randomise(model: transformers.CsmForConditionalGeneration, seed: int) -> None:
    """Draws every weight so that a mistake anywhere shows in the outputs.

    Matrices have a standard deviation of 1/sqrt(fan in), so that logits are of order one and a
    greedy choice has a margin; nothing is left at zero or one.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if hasattr(module, "cluster_usage"):
            _randomise_codebook(module, rng)
        for kind, parameter in module.named_parameters(recurse=False):
            parameter.copy_(_random_parameter(name, kind, module, rng))
    code_ids = model.config.codec_config.codebook_size
    model.lm_head.weight[code_ids:] *= _UNKNOWN_CODE_GAIN
    model.depth_decoder.codebooks_head.weight[:, :, code_ids:] *= _UNKNOWN_CODE_GAIN


def _random_parameter(
    name: str, kind: str, module: nn.Module, rng: torch.Generator
) -> torch.Tensor:
    parameter = getattr(module, kind)
    noise = torch.randn(parameter.shape, generator=rng)
    if kind == "bias":
        return 0.1 * noise
    if kind == "scale":
        return _LAYER_SCALE * (1 + 0.2 * noise)
    if parameter.ndim == 1:
        return 1 + 0.2 * noise
    if isinstance(module, nn.Embedding):
        return noise
    gain = _QUERY_GAIN if name.endswith("q_proj") else 1.0
    return noise.mul_(gain / math.sqrt(_fan_in(module)))


def _fan_in(module: nn.Module) -> int:
    """How many weighted terms an output of the module is the sum of."""
    shape = module.weight.shape
    if isinstance(module, nn.Conv1d):
        return shape[1] * shape[2]
    if isinstance(module, nn.ConvTranspose1d):
        return shape[0] // module.groups * shape[2] // module.stride[0]
    if isinstance(module, nn.Linear):
        return shape[1]
    return shape[-2]  # CsmCodebooksHead: [Q - 1, D, V], used as h @ W


def _randomise_codebook(codebook: nn.Module, rng: torch.Generator) -> None:
    """Random centroids, stored as sums over random usage; the last entry has never been used."""
    usage = 0.5 + 1.5 * torch.rand(codebook.cluster_usage.shape, generator=rng)
    usage[-1] = 0.0
    centroids = _CENTROID_SCALE * torch.randn(codebook.embed_sum.shape, generator=rng)
    codebook.cluster_usage.copy_(usage)
    codebook.embed_sum.copy_(centroids * usage.clamp(min=codebook.epsilon)[:, None])
    codebook._embed = None


@torch.no_grad()
def round_to_float16(model: nn.Module) -> None:
    """Rounds every weight to a float16 value, so that a float16 file holds the model exactly."""
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.half())
    for module in model.modules():
        if hasattr(module, "cluster_usage"):
            module._embed = None


# --- transformers -------------------------------------------------------------------------------


def hf_config(config: CSMConfig) -> transformers.CsmConfig:
    """The same model in the terms of transformers."""
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
    """A model with random weights (see `randomise`); its two audio tables are one tensor."""
    with no_init_weights():  # its own would be drawn for nothing: a minute at full size
        model = transformers.CsmForConditionalGeneration(hf_config(config)).eval()
    model.tie_weights()
    randomise(model, seed)
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
    `hub_names` gives the files the names they have in `sesame/csm-1b`, where they lie beside
    layout 1: `transformers-0000X-of-0000Y.safetensors`, `transformers.safetensors.index.json`.
    `audio_tables` picks where the tied audio table is stored, out of `AUDIO_TABLES`; without it
    that is where `save_pretrained` puts it. With shards it must stay None.
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
    """[T, Q + 1] -> [T, D], the way transformers merges text and audio rows."""
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

    A parity test on codes says something only while its rounding errors stay below it.
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

    Generation goes on until every row has ended; what follows the end of a row is arbitrary.
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


# --- torchtune ----------------------------------------------------------------------------------


class SesameModel(nn.Module):
    """The original model: torchtune transformers, embedding tables, heads.

    Parameter names are those of layout 1. torchtune's attention asks that embed_dim be a multiple
    of num_heads; `head_dim` is free. Caches live only inside `greedy`.
    """

    def __init__(self, config: CSMConfig):
        super().__init__()
        self.config = config
        backbone_dim, decoder_dim = config.backbone.embed_dim, config.depth_decoder.embed_dim
        vocab_size, num_codebooks = config.audio_vocab_size, config.num_codebooks
        self.backbone = _torchtune_llama(config.backbone)
        self.decoder = _torchtune_llama(config.depth_decoder)
        self.text_embeddings = nn.Embedding(config.text_vocab_size, backbone_dim)
        self.audio_embeddings = nn.Embedding(vocab_size * num_codebooks, backbone_dim)
        self.projection = nn.Linear(backbone_dim, decoder_dim, bias=False)
        self.codebook0_head = nn.Linear(backbone_dim, vocab_size, bias=False)
        self.audio_head = nn.Parameter(torch.empty(num_codebooks - 1, decoder_dim, vocab_size))

    def embed_codes(self, codes: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Codes of the codebooks from `first` on: [..., Q] -> [..., Q, D]."""
        codebooks = first + torch.arange(codes.shape[-1])
        return self.audio_embeddings(codes + codebooks * self.config.audio_vocab_size)

    def embed(self, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T, Q + 1] -> [B, T, D]: the sum of the columns that the mask keeps."""
        text = self.text_embeddings(frames[..., -1:])
        columns = torch.cat([self.embed_codes(frames[..., :-1]), text], dim=-2)
        return (columns * mask[..., None]).sum(dim=-2)

    @torch.no_grad()
    def hidden(self, prompt: Prompt) -> torch.Tensor:
        """Backbone output after its last norm, at every position: [T, D]."""
        frames, mask = _batch_of_one(prompt)
        return self.backbone(self.embed(frames, mask))[0]

    @torch.no_grad()
    def logits(self, prompt: Prompt) -> torch.Tensor:
        """Logits of codebook 0 at every position: [T, V]."""
        return self.codebook0_head(self.hidden(prompt))

    @torch.no_grad()
    def depth_logits(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """As `hf_depth_logits`: hidden [B, D], codes [B, Q] -> [B, Q - 1, V]."""
        hidden, codes = torch.as_tensor(hidden), torch.as_tensor(codes).long()
        inputs = torch.cat([hidden[:, None], self.embed_codes(codes[:, :-1])], dim=1)
        outputs = self.decoder(self.projection(inputs))[:, 1:]
        return torch.einsum("bqd,qdv->bqv", outputs, self.audio_head)

    def generate_frame(
        self, frames: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Adds the rows [B, T, Q + 1] at `positions` [T] to the cache; the next frame [B, Q]."""
        hidden = _cached(self.backbone, self.embed(frames, mask), positions)[:, -1]
        codes = self.codebook0_head(hidden).argmax(dim=-1, keepdim=True)
        self.decoder.reset_caches()
        inputs = torch.cat([hidden[:, None], self.embed_codes(codes)], dim=1)
        positions = torch.arange(2)
        for codebook in range(1, self.config.num_codebooks):
            outputs = _cached(self.decoder, self.projection(inputs), positions)[:, -1]
            code = (outputs @ self.audio_head[codebook - 1]).argmax(dim=-1, keepdim=True)
            codes = torch.cat([codes, code], dim=-1)
            inputs, positions = self.embed_codes(code, first=codebook), positions[-1:] + 1
        return codes

    @contextlib.contextmanager
    def caches(self, batch_size: int) -> Iterator[None]:
        """Key and value caches for `generate_frame`, as long as the models' positions."""
        device, dtype = torch.device("cpu"), torch.float32
        with contextlib.ExitStack() as stack:
            for decoder in (self.backbone, self.decoder):
                stack.enter_context(
                    local_kv_cache(decoder, batch_size=batch_size, device=device, dtype=dtype)
                )
            yield


def _torchtune_llama(config: LlamaConfig) -> tune.TransformerDecoder:
    """torchtune's `llama3_2` without vocabulary, for any head_dim and any RoPE scaling."""
    rope = _torchtune_rope(config)
    return tune.TransformerDecoder(
        tok_embeddings=nn.Identity(),
        layers=[_torchtune_layer(config, rope) for _ in range(config.num_layers)],
        max_seq_len=config.max_seq_len,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        norm=tune.RMSNorm(config.embed_dim, eps=config.norm_eps),
        output=nn.Identity(),
    )


def _torchtune_layer(config: LlamaConfig, rope: nn.Module) -> tune.TransformerSelfAttentionLayer:
    query_dim = config.num_heads * config.head_dim
    key_dim = config.num_kv_heads * config.head_dim
    attention = tune.MultiHeadAttention(
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        q_proj=nn.Linear(config.embed_dim, query_dim, bias=False),
        k_proj=nn.Linear(config.embed_dim, key_dim, bias=False),
        v_proj=nn.Linear(config.embed_dim, key_dim, bias=False),
        output_proj=nn.Linear(query_dim, config.embed_dim, bias=False),
        pos_embeddings=rope,
        max_seq_len=config.max_seq_len,
    )
    return tune.TransformerSelfAttentionLayer(
        attn=attention,
        mlp=_torchtune_mlp(config),
        sa_norm=tune.RMSNorm(config.embed_dim, eps=config.norm_eps),
        mlp_norm=tune.RMSNorm(config.embed_dim, eps=config.norm_eps),
    )


def _torchtune_mlp(config: LlamaConfig) -> tune.FeedForward:
    return tune.FeedForward(
        gate_proj=nn.Linear(config.embed_dim, config.mlp_dim, bias=False),
        down_proj=nn.Linear(config.mlp_dim, config.embed_dim, bias=False),
        up_proj=nn.Linear(config.embed_dim, config.mlp_dim, bias=False),
    )


def _torchtune_rope(config: LlamaConfig) -> nn.Module:
    scaling = config.rope_scaling
    if scaling is None:
        return tune.RotaryPositionalEmbeddings(
            config.head_dim, max_seq_len=config.max_seq_len, base=config.rope_theta
        )
    return Llama3ScaledRoPE(
        config.head_dim,
        max_seq_len=config.max_seq_len,
        base=config.rope_theta,
        scale_factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        old_context_len=scaling.original_max_seq_len,
    )


def _cached(
    decoder: tune.TransformerDecoder, inputs: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The decoder over new inputs [B, T, D] at `positions` [T], seeing its cache up to them."""
    batch_size = inputs.shape[0]
    keys = torch.arange(decoder.decoder_max_cache_seq_len)
    mask = keys[None, :] <= positions[:, None]
    return decoder(
        inputs,
        mask=mask[None].expand(batch_size, -1, -1),
        input_pos=positions[None].expand(batch_size, -1),
    )


def _batch_of_one(prompt: Prompt) -> Prompt:
    frames, mask = prompt
    return torch.as_tensor(frames).long()[None], torch.as_tensor(mask).bool()[None]


@torch.no_grad()
def greedy(model: SesameModel, prompt: Prompt, num_frames: int) -> torch.Tensor:
    """Greedy codes [num_frames, Q] in the original's loop, which here does not stop at the end."""
    frames, mask = _batch_of_one(prompt)
    positions = torch.arange(frames.shape[1])
    generated = []
    with model.caches(batch_size=1):
        for _ in range(num_frames):
            codes = model.generate_frame(frames, mask, positions)
            generated.append(codes[0])
            frames, mask = audio_rows(codes)
            frames, mask, positions = frames[None], mask[None], positions[-1:] + 1
    return torch.stack(generated)


def save_sesame(model: SesameModel, directory: Path | str, as_checkpoint: bool = False) -> Path:
    """Writes layout 1 and returns the directory.

    `model.safetensors`, or `ckpt.pt` by `torch.save`. The `config.json` has the original's
    fields; its flavours name the released sizes whatever the sizes of this model are.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if as_checkpoint:
        torch.save(weights, directory / "ckpt.pt")
    else:
        save_file(weights, directory / "model.safetensors")
    fields = {
        "backbone_flavor": "llama-1B",
        "decoder_flavor": "llama-100M",
        "text_vocab_size": model.config.text_vocab_size,
        "audio_vocab_size": model.config.audio_vocab_size,
        "audio_num_codebooks": model.config.num_codebooks,
    }
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return directory


def sesame_from_hf(
    model: transformers.CsmForConditionalGeneration, config: CSMConfig
) -> SesameModel:
    """The same weights in layout 1; tensors that need no permutation share their memory."""
    weights = {
        "text_embeddings.weight": model.embed_text_tokens.weight,
        "audio_embeddings.weight": model.get_parameter(AUDIO_TABLES["backbone"]),
        "projection.weight": model.depth_decoder.model.inputs_embeds_projector.weight,
        "codebook0_head.weight": model.lm_head.weight,
        "audio_head": model.depth_decoder.codebooks_head.weight,
    }
    weights |= _llama_weights("backbone", model.backbone_model, config.backbone)
    weights |= _llama_weights("decoder", model.depth_decoder.model, config.depth_decoder)
    with torch.device("meta"):
        sesame = SesameModel(config)
    sesame.load_state_dict({name: tensor.detach() for name, tensor in weights.items()}, assign=True)
    for module in sesame.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
    return sesame.eval()


def sesame_model(config: CSMConfig, seed: int = 0) -> SesameModel:
    """A model with the weights of `hf_model(config, seed)`."""
    return sesame_from_hf(hf_model(config, seed), config)


_SESAME_NAMES = {
    "self_attn.v_proj": "attn.v_proj.weight",
    "self_attn.o_proj": "attn.output_proj.weight",
    "mlp.gate_proj": "mlp.w1.weight",
    "mlp.down_proj": "mlp.w2.weight",
    "mlp.up_proj": "mlp.w3.weight",
    "input_layernorm": "sa_norm.scale",
    "post_attention_layernorm": "mlp_norm.scale",
}


def _llama_weights(prefix: str, model: nn.Module, config: LlamaConfig) -> dict[str, torch.Tensor]:
    weights = {f"{prefix}.norm.scale": model.norm.weight}
    for number, layer in enumerate(model.layers):
        start = f"{prefix}.layers.{number}"
        for name, target in _SESAME_NAMES.items():
            weights[f"{start}.{target}"] = layer.get_submodule(name).weight
        attention = layer.self_attn
        weights[f"{start}.attn.q_proj.weight"] = interleave(
            attention.q_proj.weight, config.num_heads
        )
        weights[f"{start}.attn.k_proj.weight"] = interleave(
            attention.k_proj.weight, config.num_kv_heads
        )
    return weights


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorders the rows of a q or k projection from rotated halves to rotated neighbours.

    Within a head, rows (j, j + head_dim / 2) of transformers become rows (2j, 2j + 1).
    """
    order = torch.arange(weight.shape[0]).reshape(num_heads, 2, -1)
    return weight[order.transpose(1, 2).flatten()]


# --- Prompts ------------------------------------------------------------------------------------


def text_rows(config: CSMConfig, ids: torch.Tensor) -> Prompt:
    """Text ids [T] as frames."""
    ids = torch.as_tensor(ids).long()
    frames = torch.zeros(len(ids), config.num_codebooks + 1, dtype=torch.long)
    frames[:, -1] = ids
    mask = torch.zeros(frames.shape, dtype=torch.bool)
    mask[:, -1] = True
    return frames, mask


def audio_rows(codes: torch.Tensor) -> Prompt:
    """Codes [F, Q] as frames."""
    frames = nn.functional.pad(torch.as_tensor(codes).long(), (0, 1))
    mask = torch.ones(frames.shape, dtype=torch.bool)
    mask[:, -1] = False
    return frames, mask


def concatenate(prompts: Sequence[Prompt]) -> Prompt:
    frames, masks = zip(*prompts, strict=True)
    return (
        torch.cat([torch.as_tensor(rows).long() for rows in frames]),
        torch.cat([torch.as_tensor(rows).bool() for rows in masks]),
    )


def frames_from_ids(config: CSMConfig, input_ids: torch.Tensor, codes: torch.Tensor) -> Prompt:
    """The ids of a chat prompt [T] as frames.

    Its audio ids become the rows of `codes` [F, Q] in order, its audio_eos ids frames of zeros.
    """
    input_ids = torch.as_tensor(input_ids)
    is_code = input_ids == config.text_token_ids.audio
    is_audio = is_code | (input_ids == config.text_token_ids.audio_eos)
    rows = torch.zeros(len(input_ids), config.num_codebooks, dtype=torch.long)
    rows[is_code] = torch.as_tensor(codes).long()
    text, audio = text_rows(config, input_ids), audio_rows(rows)
    frames, mask = (torch.where(is_audio[:, None], a, t) for a, t in zip(audio, text, strict=True))
    return frames, mask


def random_turn_ids(config: CSMConfig, num_ids: int, rng: torch.Generator) -> torch.Tensor:
    """BOS, `num_ids` random ids below every special id, EOS: [num_ids + 2]."""
    special = config.text_token_ids
    ids = torch.randint(0, min(vars(special).values()), (num_ids,), generator=rng)
    return torch.cat([torch.tensor([special.bos]), ids, torch.tensor([special.eos])])


def random_chat_ids(
    config: CSMConfig,
    rng: torch.Generator,
    context: Sequence[tuple[int, int]],
    num_ids: int,
) -> torch.Tensor:
    """Ids [T] of a chat prompt: turns of (text ids, audio frames), then one of text alone."""
    special = config.text_token_ids
    parts = []
    for context_ids, num_frames in context:
        parts.append(random_turn_ids(config, context_ids, rng))
        parts.append(torch.tensor([special.audio] * num_frames + [special.audio_eos]))
    return torch.cat([*parts, random_turn_ids(config, num_ids, rng)])


def random_prompt(
    config: CSMConfig, seed: int, num_ids: int = 9, context: Sequence[tuple[int, int]] = ()
) -> Prompt:
    """The prompt of `random_chat_ids` with random codes, as frames."""
    rng = torch.Generator().manual_seed(seed)
    ids = random_chat_ids(config, rng, context, num_ids)
    shape = (sum(num_frames for _, num_frames in context), config.num_codebooks)
    codes = torch.randint(0, config.codec.codebook_size, shape, generator=rng)
    return frames_from_ids(config, ids, codes)
