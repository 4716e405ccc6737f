"""The model of SesameAILabs/csm (`models.py`) from the same torchtune modules: layout 1."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torchtune import modules as tune
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules.common_utils import local_kv_cache

from csm_jax.config import CSMConfig, LlamaConfig
from oracles.huggingface import AUDIO_TABLES, hf_model
from oracles.prompts import Prompt, audio_rows


class SesameModel(nn.Module):
    """The original model: torchtune transformers, embedding tables, heads.

    Parameter names are those of layout 1. torchtune's attention requires that embed_dim is a
    multiple of num_heads; `head_dim` is free. Caches exist only inside `greedy`.
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
    """The decoder over inputs [B, T, D] at `positions` [T], attending to the earlier cache."""
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
    """Greedy codes [num_frames, Q] of the original's loop, which here does not stop at the end."""
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
    fields; its flavors are those of the released sizes, whatever the sizes of this model are.
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
    """Reorders the rows of a q or k projection from rotated halves to rotated adjacent pairs.

    Within a head, rows (j, j + head_dim / 2) of transformers become rows (2j, 2j + 1).
    """
    order = torch.arange(weight.shape[0]).reshape(num_heads, 2, -1)
    return weight[order.transpose(1, 2).flatten()]
