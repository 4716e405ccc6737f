"""A conversation as frames: what the backbone reads before it speaks.

A turn is BOS, "[speaker]text", EOS, then its audio frames and one frame of zeros; the turn to be
spoken has text only (SesameAILabs/csm `generator.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.audio import check_audio
from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.generation import Prompt
from csm_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Segment:
    """One turn of the conversation so far.

    Attributes:
      speaker: any number; the same number is the same voice.
      text: what is said, as a transcript of `audio`.
      audio: float [num_samples] at 24 kHz, mono; None for a turn that is only read.
      codes: int [num_frames, Q], used instead of `audio` where the codes are known already.
    """

    speaker: int
    text: str
    audio: np.ndarray | None = None
    codes: np.ndarray | None = None


def build_prompt(
    text: str,
    speaker: int,
    context: Sequence[Segment],
    config: CSMConfig,
    tokenizer: Tokenizer,
    encode: Callable[[np.ndarray], np.ndarray],
    max_frames: int,
) -> Prompt:
    """Frames int32 [T, Q + 1] and mask bool [T, Q + 1] of a conversation up to its next turn.

    Args:
      encode: the codec, audio [num_samples] to codes [num_frames, Q].
      max_frames: how many frames will be generated after the prompt.

    Raises:
      InputError: a text is empty, or the prompt leaves no room for `max_frames`.
    """
    parts = [part for turn in context for part in _turn(turn, config, tokenizer, encode)]
    parts.append(_text_rows(text, speaker, config, tokenizer))
    frames = np.concatenate([frames for frames, _ in parts])
    mask = np.concatenate([mask for _, mask in parts])
    _check_room(len(frames), max_frames, config)
    return frames, mask


def check_text(text: str) -> None:
    """Raises `InputError` for text that says nothing."""
    if not text.strip():
        raise InputError("the text is empty: there is nothing to say")


def _turn(
    turn: Segment,
    config: CSMConfig,
    tokenizer: Tokenizer,
    encode: Callable[[np.ndarray], np.ndarray],
) -> list[Prompt]:
    rows = [_text_rows(turn.text, turn.speaker, config, tokenizer)]
    codes = turn.codes
    if codes is None and turn.audio is not None:
        codes = encode(check_audio(turn.audio))
    if codes is not None:
        rows.append(_audio_rows(np.asarray(codes), config))
    return rows


def _text_rows(text: str, speaker: int, config: CSMConfig, tokenizer: Tokenizer) -> Prompt:
    check_text(text)
    ids = tokenizer.encode(f"[{speaker}]{text}")
    frames = np.zeros((len(ids), config.num_codebooks + 1), np.int32)
    frames[:, -1] = ids
    mask = np.zeros(frames.shape, bool)
    mask[:, -1] = True
    return frames, mask


def _audio_rows(codes: np.ndarray, config: CSMConfig) -> Prompt:
    """Code frames and the frame of zeros that ends them."""
    if codes.ndim != 2 or codes.shape[1] != config.num_codebooks:
        raise InputError(
            f"codes have shape {list(codes.shape)}, expected [num_frames, {config.num_codebooks}]"
        )
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"codes have dtype {codes.dtype}, expected whole numbers")
    limit = config.audio_vocab_size
    if codes.size and not 0 <= codes.min() <= codes.max() < limit:
        raise InputError(f"codes range {codes.min()}..{codes.max()}, expected 0..{limit - 1}")
    frames = np.zeros((len(codes) + 1, config.num_codebooks + 1), np.int32)
    frames[:-1, :-1] = codes
    mask = np.ones(frames.shape, bool)
    mask[:, -1] = False
    return frames, mask


def _check_room(length: int, max_frames: int, config: CSMConfig) -> None:
    # The reference refuses a prompt of exactly max_seq_len - max_frames too.
    limit = config.backbone.max_seq_len - max_frames - 1
    if limit < 1:
        longest = (config.backbone.max_seq_len - 2) * config.frame_ms
        raise InputError(
            f"{max_frames} frames of audio leave no room for a prompt in "
            f"{config.backbone.max_seq_len} positions: lower max_audio_length_ms, {longest:.0f} at "
            "the most and less with text and context"
        )
    if length > limit:
        raise InputError(
            f"text and context take {length} positions, at most {limit} fit beside {max_frames} "
            "frames of audio: shorten the text, drop context or lower max_audio_length_ms"
        )
