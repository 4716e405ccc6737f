"""The history of a request: the turns of its context and its own parts, as far as they are kept."""

from collections.abc import Sequence

import numpy as np

from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request import Notice, Notify, Request
from csm_jax.prompt.turns import Prompt, Segment, Turn
from csm_jax.prompt.window import ContextTurn, choose_context, find_pinned, fits


class History:
    """The turns of a request's context and its parts so far, as far as they are kept.

    The first part has all turns as its context if they fit. Otherwise, and for the parts after it,
    `choose_context` decides. A turn that has been left out does not come back, so the first part
    tells which recordings have to be encoded.
    """

    def __init__(self, model: LoadedModel, request: Request, window: int, notify: Notify):
        """Takes the turns of the request's voice and of its context.

        Args:
          window: positions of the model.
          notify: called with notices about turns that are silent or left out.

        Raises:
          InputError: a turn is not what it should be.
        """
        self._model = model
        self._request = request
        self._window = window
        self._notify = notify
        turns = [*request.voice_turns, *request.context]
        self._num_voice = len(request.voice_turns)
        pinned = find_pinned(turns, self._num_voice or request.shared_turns)
        self._turns = [
            ContextTurn(Turn(turn, model.config, model.tokenizer), index + 1, index in pinned)
            for index, turn in enumerate(turns)
        ]
        self._is_first = True

    @property
    def kept(self) -> list[int]:
        """The indices of the turns of the request's context that are kept."""
        first = self._num_voice + 1
        return [turn.number - first for turn in self._turns if turn.number >= first]

    @property
    def num_shared(self) -> int:
        """Positions of the voice's turns, or of shared ones; 0 if one of them is left out."""
        count = self._num_voice or self._request.shared_turns
        shared = [turn for turn in self._turns if 1 <= turn.number <= count]
        return sum(each.turn.length for each in shared) if len(shared) == count else 0

    def rows(self) -> list[Prompt]:
        """The rows of the kept turns; encodes what was not encoded before."""
        return [rows for each in self._turns for rows in each.turn.rows(self._model.encode)]

    def add(self, text: str, codes: np.ndarray) -> None:
        """Adds a part that was spoken, int32 [num_frames, Q]."""
        speaker, config = self._request.speaker, self._model.config
        segment = Segment(speaker, text, codes=codes)
        has_voice = any(each.is_pinned and each.turn.speaker == speaker for each in self._turns)
        turn = Turn(segment, config, self._model.tokenizer)
        self._turns.append(ContextTurn(turn, 0, segment.has_sound and not has_voice))

    def make_room(self, length: int, num_frames: int) -> int:
        """Leaves turns out so that some frames fit after the text of the next part, if possible.

        Args:
          length: positions of the text.

        Returns:
          How many frames do fit.
        """
        # The end of speech takes a position too.
        room = self._window - 1 - length
        before, self._turns = self._turns, self._choose(room - num_frames)
        if self._is_first:
            self._report_silence()
        self._report_dropped(before)
        self._is_first = False
        return room - sum(each.turn.length for each in self._turns)

    def _choose(self, room: int) -> list[ContextTurn]:
        if self._is_first and fits(self._turns, room):
            return self._turns
        seconds = self._request.context_seconds
        if seconds is None:
            seconds = self._model.inference.context_seconds
        num_frames = 1000 * seconds / self._model.config.frame_ms
        return choose_context(self._turns, self._request.speaker, room, num_frames)

    def _report_silence(self) -> None:
        for each in self._turns:
            if each.turn.is_silent:
                number = each.number - self._num_voice  # a voice has codes, which are not silent
                message = (
                    f"the recording of turn {number} of the context is silent: record it louder"
                )
                self._notify(Notice("silent_context", message))

    def _report_dropped(self, before: Sequence[ContextTurn]) -> None:
        """Names turns of the context that do not fit; after the first part, only pinned ones."""
        kept = {each.number for each in self._turns}
        dropped = [each for each in before if each.number and each.number not in kept]
        first = self._num_voice + 1
        if any(each.number < first for each in dropped):
            message = "the voice was left out: the text, with room for the speech, takes its place"
            self._notify(Notice("context_dropped", message))
        told = [each.number for each in dropped if each.is_pinned or self._is_first]
        if numbers := [number - self._num_voice for number in told if number >= first]:
            message = (
                f"{_list_numbers(numbers)} of {len(self._request.context)} turns of context were "
                "left out: all together, with room for the speech, take more than "
                f"{self._window} positions"
            )
            self._notify(Notice("context_dropped", message))


def _list_numbers(numbers: Sequence[int]) -> str:
    """Ascending numbers as a list of runs, "2, 5 to 8"."""
    known = set(numbers)
    firsts = [number for number in numbers if number - 1 not in known]
    lasts = [number for number in numbers if number + 1 not in known]
    runs = zip(firsts, lasts, strict=True)
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
