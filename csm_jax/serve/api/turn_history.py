"""The earlier turns of a conversation: those that later turns need, and what was heard of them."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.inference.alignment.words import Word
from csm_jax.prompt.turns import Segment, Turn
from csm_jax.prompt.window import find_newest
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.api.character_times import WordPlaces
from csm_jax.serve.service import Service


@dataclass(frozen=True)
class SpokenTurn:
    """A turn that was spoken.

    Attributes:
      number: of the utterance.
      codes: int32 [num_frames, Q].
      words: those of the text that have times; None if the model knows no times.
    """

    number: int
    speaker: int
    text: str
    codes: np.ndarray
    words: Sequence[Word] | None

    @property
    def segment(self) -> Segment:
        """The turn as context."""
        return Segment(self.speaker, self.text, codes=self.codes)

    def heard(self, seconds: float, frame_seconds: float) -> "SpokenTurn | None":
        """What was heard of it in its first seconds; None if no word was.

        A word was heard if half of it was. Text and codes end with the last such word; where words
        have no times, the whole text is kept, and the codes up to that time.
        """
        if self.words is None:
            return self._cut(self.text, None, math.floor(round(seconds / frame_seconds, 3)))
        heard = [
            i
            for i, word in enumerate(self.words)
            if word.spoken and word.start + word.end <= 2 * seconds
        ]
        if not heard:
            return None
        words = self.words[: heard[-1] + 1]
        found = list(WordPlaces(self.text).find(words))
        text = self.text[: found[-1].last] if found else ""
        return self._cut(text, words, math.ceil(round(words[-1].end / frame_seconds, 3)))

    def _cut(self, text: str, words: Sequence[Word] | None, num_frames: int) -> "SpokenTurn | None":
        codes = self.codes[:num_frames]
        if not (text and len(codes)):
            return None
        return dataclasses.replace(self, text=text, codes=codes, words=words)


@dataclass(eq=False)
class _Kept:
    """A turn of the history, and the positions of the window that it takes."""

    segment: Segment
    length: int
    spoken: SpokenTurn | None = None


class TurnHistory:
    """The turns of a conversation that fix its voices, and the newest that fit the window."""

    def __init__(self, service: Service, caller: Caller):
        """Starts without turns."""
        self._service = service
        self._caller = caller
        self._kept: list[_Kept] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def turns(self) -> list[Segment]:
        """The turns, oldest first."""
        return [kept.segment for kept in self._kept]

    async def add(self, segment: Segment) -> None:
        """Adds a turn that was not spoken here, and drops those that do not fit any more."""
        await self._add(segment, None)

    async def add_spoken(self, turn: SpokenTurn) -> None:
        """`add` for a turn that was spoken."""
        await self._add(turn.segment, turn)

    async def cut(self, number: int, seconds: float) -> str:
        """Keeps what was heard of an utterance in its first seconds, and of later ones nothing.

        Returns:
          The text of what is kept.
        """
        text = ""
        for kept in list(self._kept):
            if kept.spoken is None or kept.spoken.number < number:
                continue
            heard = kept.spoken.heard(seconds, self._service.model.config.frame_ms / 1000)
            if kept.spoken.number > number or heard is None:
                self._kept.remove(kept)
                continue
            text = heard.text
            length = await self._length(heard.segment)
            kept.segment, kept.length, kept.spoken = heard.segment, length, heard
        return text

    async def _add(self, segment: Segment, spoken: SpokenTurn | None) -> None:
        self._kept.append(_Kept(segment, await self._length(segment), spoken))
        most, window = self._service.settings.limits.turns, self._service.engine.max_seq_len
        lengths = [kept.length for kept in self._kept]
        self._kept = [self._kept[i] for i in find_newest(self.turns, most, lengths, window)]

    async def _length(self, segment: Segment) -> int:
        # In a thread, because tokenizing a long text would block the event loop.
        return await self._service.threads.work(self._caller, self._length_of, segment)

    def _length_of(self, segment: Segment) -> int:
        model = self._service.model
        return Turn(segment, model.config, model.tokenizer).length
