"""Random weights with which errors show: attention is peaked, logits are distinct."""

import math

import torch
import transformers
from torch import nn

# Larger than fan-in scaling, so that attention is peaked and an error in RoPE shows.
_QUERY_GAIN = 2.0
# Like a trained model, these heads do not predict the ids beyond the codec's codebook.
_UNKNOWN_CODE_GAIN = 0.1
_LAYER_SCALE = 0.3
# About the size of the random codec's projected latents, so that all codes are in use.
_CENTROID_SCALE = 0.4


@torch.no_grad()
def randomize(model: transformers.CsmForConditionalGeneration, seed: int) -> None:
    """Draws every weight so that an error anywhere shows in the outputs.

    Matrices have a standard deviation of 1/sqrt(fan in), so that logits are of order one and a
    greedy choice has a margin; no weight stays zero or one.
    """
    rng = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if hasattr(module, "cluster_usage"):
            _randomize_codebook(module, rng)
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
    """The number of weighted terms in an output of the module."""
    shape = module.weight.shape
    if isinstance(module, nn.Conv1d):
        return shape[1] * shape[2]
    if isinstance(module, nn.ConvTranspose1d):
        return shape[0] // module.groups * shape[2] // module.stride[0]
    if isinstance(module, nn.Linear):
        return shape[1]
    return shape[-2]  # CsmCodebooksHead: [Q - 1, D, V], used as h @ W


def _randomize_codebook(codebook: nn.Module, rng: torch.Generator) -> None:
    """Random centroids, stored as sums over random usage; the usage of the last entry is zero."""
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
