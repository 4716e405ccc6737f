"""Conversations as rows: what the backbone reads, and which rows of it are to be learnt."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.prompt import Segment, join_rows, turn_rows
from csm_jax.tokenizer import Tokenizer
from csm_jax.train.data import Conversation, Problem, each_or_all_faults

TURNS = ("all", "last")


class Example(NamedTuple):
    """One conversation.

    Attributes:
      frames, mask: [T, Q + 1], int32 and bool, as `prompt.join_rows` makes them.
      targets: bool [T], rows of audio to be learnt, the end of speech among them.
      segments: the turns that it was made of.
    """

    frames: np.ndarray
    mask: np.ndarray
    targets: np.ndarray
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Selection:
    """What of the conversations is to be learnt.

    Attributes:
      speakers: whose turns; None is everybody's.
      turns: of `TURNS`; those with `"train": false` never.
      max_len: positions of a conversation, at most.
    """

    speakers: Collection[int] | None = None
    turns: str = "all"
    max_len: int = 2048


def make_examples(
    conversations: Sequence[Conversation],
    codes: Mapping[Path, np.ndarray | InputError],
    config: CSMConfig,
    tokenizer: Tokenizer,
    selection: Selection,
) -> tuple[list[Example], list[Problem]]:
    """The conversations that can be learnt from, and what is wrong with the others."""
    examples = []
    problems = []
    for conversation in conversations:
        try:
            examples.append(_make(conversation, codes, config, tokenizer, selection))
        except InputError as error:
            problems.append(Problem(conversation.line, str(error)))
    return examples, problems


def _make(
    conversation: Conversation,
    codes: Mapping[Path, np.ndarray | InputError],
    config: CSMConfig,
    tokenizer: Tokenizer,
    selection: Selection,
) -> Example:
    def heard(index: int) -> Segment:
        turn = conversation.turns[index]
        found = codes[turn.audio]
        if isinstance(found, InputError):
            raise InputError(f"turn {index + 1}: {found}")
        return Segment(turn.speaker, turn.text, codes=found)

    segments = each_or_all_faults(heard, len(conversation.turns))
    parts, targets = [], []
    for i, segment in enumerate(segments):
        text, audio = turn_rows(segment, config, tokenizer)
        parts += [text, audio]
        is_learnt = _is_learnt(conversation, i, selection)
        targets += [np.zeros(len(text[0]), bool), np.full(len(audio[0]), is_learnt)]
    example = Example(*join_rows(parts), np.concatenate(targets), tuple(segments))
    if len(example.frames) > selection.max_len:
        raise InputError(
            f"{len(example.frames)} positions of text and audio, but at most {selection.max_len} "
            "fit: cut it into shorter conversations"
        )
    if not example.targets.any():
        raise InputError("nothing in it is to be learnt: no turn of the speakers and turns wanted")
    return example


def _is_learnt(conversation: Conversation, turn: int, selection: Selection) -> bool:
    is_wanted = selection.turns == "all" or turn == len(conversation.turns) - 1
    speaker = conversation.turns[turn].speaker
    is_speaker = selection.speakers is None or speaker in selection.speakers
    return conversation.learnt[turn] and is_wanted and is_speaker
