"""Conversations as rows: what the backbone reads, and which of its positions count in the loss."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.prompt.limits import PromptLimits
from csm_jax.prompt.tokenizer import Tokenizer
from csm_jax.prompt.turns import Prompt, Segment, join_rows, turn_rows
from csm_jax.train.codes import Source
from csm_jax.train.data import Problem, RecordedConversation, RecordedTurn, collect_or_fail
from csm_jax.train.spoken_rows import spoken_rows

TURNS = ("all", "last")
# The codes of every recording, int32 [num_frames, Q], or the error of one that cannot be used.
Codes = Mapping[Source, np.ndarray | InputError]


class Example(NamedTuple):
    """One conversation.

    Attributes:
      frames, mask: [T, Q + 1], int32 and bool, as `turns.join_rows` makes them.
      loss_mask: bool [T], the audio frames that count in the loss, ends of speech among them.
      segments: the turns that it was made of.
      spoken: int32 [T, 2], of each frame the positions of the text that is spoken in it, as
        `guided_attention.guided_frames` has them; None if the selection is not guided.
    """

    frames: np.ndarray
    mask: np.ndarray
    loss_mask: np.ndarray
    segments: tuple[Segment, ...]
    spoken: np.ndarray | None = None


@dataclass(frozen=True)
class Selection:
    """The turns that count in the loss; the others are context.

    Attributes:
      speakers: whose turns; None is those of all speakers.
      turns: all of a conversation, or the last; those that are not trainable never count.
      max_len: positions of a conversation, at most.
      is_guided: whether examples say what is spoken in each frame.
      diagonal: as for `spoken_rows.spoken_rows`.
    """

    speakers: Collection[int] | None = None
    turns: str = "all"
    max_len: int = 2048
    is_guided: bool = False
    diagonal: float = 0.0

    def has(self, turn: RecordedTurn, is_last: bool) -> bool:
        """Whether a turn counts."""
        is_wanted = self.turns == "all" or is_last
        is_speaker = self.speakers is None or turn.speaker in self.speakers
        return turn.is_trainable and is_wanted and is_speaker


def make_examples(
    conversations: Sequence[RecordedConversation],
    codes: Codes,
    config: CSMConfig,
    tokenizer: Tokenizer,
    selection: Selection,
) -> tuple[list[Example], list[Problem]]:
    """The conversations that can be trained on, and the problems of the others."""
    examples: list[Example] = []
    problems: list[Problem] = []
    for conversation in conversations:
        try:
            examples.append(_make(conversation, codes, config, tokenizer, selection))
        except InputError as error:
            problems.append(Problem(conversation.line, str(error)))
    return examples, problems


def _make(
    conversation: RecordedConversation,
    codes: Codes,
    config: CSMConfig,
    tokenizer: Tokenizer,
    selection: Selection,
) -> Example:
    segments = _segments(conversation, codes)
    parts, counts = [], []
    for i, (turn, segment) in enumerate(zip(conversation.turns, segments, strict=True)):
        text, audio = turn_rows(segment, config, tokenizer)
        parts += [text, audio]
        is_selected = selection.has(turn, is_last=i == len(segments) - 1)
        counts += [np.zeros(len(text[0]), bool), np.full(len(audio[0]), is_selected)]
    spoken = None
    if selection.is_guided:
        spoken = _spoken(conversation.turns, parts, config, tokenizer, selection.diagonal)
    example = Example(*join_rows(parts), np.concatenate(counts), tuple(segments), spoken)
    if len(example.frames) > selection.max_len:
        raise InputError(
            f"{len(example.frames)} positions of text and audio, but at most {selection.max_len} "
            "fit: cut it into shorter conversations"
        )
    if not example.loss_mask.any():
        raise InputError("nothing in it to train on: it has no turn of the selected ones")
    return example


def _spoken(
    turns: Sequence[RecordedTurn],
    parts: Sequence[Prompt],
    config: CSMConfig,
    tokenizer: Tokenizer,
    diagonal: float,
) -> np.ndarray:
    """`Example.spoken`, of turns with two parts each, text and audio."""
    rows, start = [], 0
    for turn, text, audio in zip(turns, parts[::2], parts[1::2], strict=True):
        num_text, num_frames = len(text.frames), len(audio.frames) - 1
        found = spoken_rows(turn, num_frames, config, tokenizer, diagonal=diagonal)
        # The frame of zeros that ends a turn speaks nothing.
        rows += [np.zeros((num_text, 2), np.int32), start + found, np.zeros((1, 2), np.int32)]
        start += num_text + num_frames + 1
    return np.concatenate(rows)


def _segments(conversation: RecordedConversation, codes: Codes) -> list[Segment]:
    def segment(index: int) -> Segment:
        turn = conversation.turns[index]
        found = codes[turn.source]
        if isinstance(found, InputError):
            raise InputError(f"turn {index + 1}: {found}")
        return Segment(turn.speaker, turn.text, codes=found)

    return collect_or_fail(segment, len(conversation.turns))


def data_limits(examples: Sequence[Example]) -> PromptLimits:
    """The prompt limits of a model that is trained on these conversations alone.

    A model speaks texts of the lengths that it was trained on, and no longer ones.
    """
    longest = max(len(turn.text or "") for each in examples for turn in each.segments)
    return PromptLimits(max(1, min(longest, PromptLimits.max_part_characters)))
