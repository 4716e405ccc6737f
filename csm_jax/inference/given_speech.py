"""Speech that is given, not generated: the rows of its conversation, in padded batches."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from csm_jax.errors import InputError
from csm_jax.inference.buckets import bucket
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.model.layers import AnyArray
from csm_jax.prompt.turns import Prompt, Segment, Turn, join_rows


class GivenSpeech(NamedTuple):
    """The last turn of a conversation, with all of it as a prompt.

    Attributes:
      prompt: the rows of the conversation; the last one is the frame of zeros that ends it.
      codes: int32 [F, Q], of the speech.
      num_text: positions of its text, which are those before the speech.
    """

    prompt: Prompt
    codes: np.ndarray
    num_text: int

    @property
    def start(self) -> int:
        """The position of its first frame, or of the end if it has none."""
        return len(self.prompt.frames) - len(self.codes) - 1


class GivenRows(NamedTuple):
    """Speech of a batch, padded on the right to buckets.

    Attributes:
      frames, mask: [B, T, Q + 1], int32 and bool.
      start: int32 [B], the position of each row's first frame.
    """

    frames: AnyArray
    mask: AnyArray
    start: AnyArray


def segment_of(text: str, speech: np.ndarray, speaker: int) -> Segment:
    """A turn whose speech is given as codes, int [F, Q], or as audio, float [num_samples]."""
    array = np.asarray(speech)
    if array.ndim == 2 and np.issubdtype(array.dtype, np.integer):
        return Segment(speaker, text, codes=array)
    return Segment(speaker, text, array)


def read_speech(model: LoadedModel, conversation: Sequence[Segment]) -> GivenSpeech:
    """The rows of a conversation, whose last turn is the speech; encodes its recordings.

    Raises:
      InputError: a turn is not what it should be, the last one has no text or no speech, or all
        together are longer than the model's window.
    """
    if not conversation or not all(isinstance(turn, Segment) for turn in conversation):
        raise InputError("a conversation must be a list of turns, the last with the speech")
    last = conversation[-1]
    if last.text is None or (last.audio is None and last.codes is None):
        raise InputError("the last turn must have a text and its speech, as audio or as codes")
    turns = [Turn(turn, model.config, model.tokenizer) for turn in conversation]
    length, limit = sum(turn.length for turn in turns), model.config.backbone.max_seq_len
    if length > limit:
        raise InputError(
            f"the conversation takes {length} positions, but the model has {limit}: leave out its "
            "oldest turns, or give shorter speech"
        )
    *context, (text, sound) = [turn.rows(model.encode) for turn in turns]
    prompt = join_rows([*(rows for turn in context for rows in turn), text, sound])
    return GivenSpeech(prompt, sound.frames[:-1, :-1], len(text.frames))


def batches(
    speeches: Sequence[GivenSpeech], max_batch: int
) -> Iterator[tuple[list[int], GivenRows]]:
    """Batches of similar lengths, and the index of each row's speech; empty rows fill them up.

    The sizes of a batch are powers of two, so that few shapes are compiled.
    """
    order = sorted(range(len(speeches)), key=lambda i: len(speeches[i].prompt.frames))
    for first in range(0, len(order), max_batch):
        indices = order[first : first + max_batch]
        num_rows = min(bucket(len(indices), 1), max_batch)
        yield indices, pad_rows([speeches[i] for i in indices], num_rows)


def pad_rows(speeches: Sequence[GivenSpeech], num_rows: int) -> GivenRows:
    """Speech as the first rows of a batch."""
    length = bucket(max(len(speech.prompt.frames) for speech in speeches))
    frames = np.zeros((num_rows, length, speeches[0].prompt.frames.shape[1]), np.int32)
    mask = np.zeros(frames.shape, bool)
    start = np.ones(num_rows, np.int32)
    for row, speech in enumerate(speeches):
        size = len(speech.prompt.frames)
        frames[row, :size], mask[row, :size] = speech.prompt
        start[row] = speech.start
    return GivenRows(frames, mask, start)
