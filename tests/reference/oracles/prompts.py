"""Prompts as frames, in torch."""

from collections.abc import Sequence

import torch
from torch import nn

from csm_jax.config import CSMConfig

Prompt = tuple[torch.Tensor, torch.Tensor]


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
