"""Several takes of a request, of which the best is kept.

The takes are requests like any other, so they are generated side by side, each with a seed of its
own.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

from csm_jax.errors import CSMError, first_line
from csm_jax.inference.given_speech import GivenSpeech, read_speech
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request import Notice, OnWord, Request
from csm_jax.inference.request_state import RequestState
from csm_jax.inference.scores import Score, score_speech
from csm_jax.inference.ticket import Ticket
from csm_jax.prompt.turns import Segment, Turn

# Takes whose attention over the window is in memory at once.
_SCORED_AT_ONCE = 4
# Notices of speech that lacks something.
_FAULTS = {"cut", "guard_cut", "nothing_said"}

Submit = Callable[[Request], Ticket]


def submit_takes(
    request: Request,
    model: LoadedModel,
    max_seq_len: int,
    submit: Submit,
    stream: bool,
    keep: bool,
    on_word: OnWord | None,
) -> Ticket:
    """Submits the takes of a request.

    Args:
      max_seq_len: positions of the window.
      submit: submits one of them.
      stream, keep, on_word: as for `Engine.submit`.

    Returns:
      A ticket that is over once all takes are, and has the best of them. As a stream it has one
      chunk.

    Raises what `submit` raises; then no take is generated.
    """
    encoded, notices = _encode_context(request, model, max_seq_len)
    takes: list[Ticket] = []
    try:
        for seed in take_seeds(request.seed, request.best_of):
            takes.append(submit(dataclasses.replace(encoded, seed=seed, best_of=1)))
    except BaseException:
        for take in takes:
            take.cancel()
        raise
    ticket = _BestTake(request, model, stream, keep, on_word)
    ticket.notices += notices
    ticket.start(takes)
    return ticket


def take_seeds(seed: int, count: int) -> list[int]:
    """The seeds of the takes; the first is that of the request."""
    # The parts of a text have other seeds (`request_state.py`).
    derived = [np.random.SeedSequence([seed % 2**32, 0, 0, take]) for take in range(1, count)]
    return [seed, *(int(each.generate_state(1)[0]) for each in derived)]


def _encode_context(
    request: Request, model: LoadedModel, max_seq_len: int
) -> tuple[Request, list[Notice]]:
    """The request with the codes of its recordings, which all takes need, and what is to be known
    of them."""
    notices: list[Notice] = []
    plan = RequestState(model, request, notices.append, max_seq_len)
    context = list(request.context)
    for index in plan.kept_turns:
        audio = context[index].audio
        if audio is not None and context[index].codes is None:
            codes = model.encode(audio)
            context[index] = dataclasses.replace(context[index], audio=None, codes=codes)
    silent = [notice for notice in notices if notice.kind == "silent_context"]
    return dataclasses.replace(request, context=context), silent


class _BestTake(Ticket):
    """The ticket of a request whose takes have tickets of their own."""

    _takes: Sequence[Ticket] = ()

    def start(self, takes: Sequence[Ticket]) -> None:
        """Waits for the takes in a thread.

        The engine's own has other requests; and it is no daemon, because an interpreter that exits
        during a computation crashes.
        """
        self._takes = takes
        threading.Thread(target=self._run, name="csm_jax.takes").start()

    def cancel(self) -> None:
        super().cancel()
        for take in self._takes:
            take.cancel()

    def _run(self) -> None:
        try:
            self._choose()
            self.finish()
        except CSMError as error:
            self.cancel()
            self.finish(error)
        except Exception as error:
            failure = CSMError(f"no take could be chosen: {first_line(error)}")
            failure.__cause__ = error
            self.finish(failure)

    def _choose(self) -> None:
        """Waits for all takes, and becomes the best. Raises `CSMError` if one has failed."""
        for take in self._takes:
            take.codes()
        ranks = _rank(self._model, self._takes)
        best = self._takes[ranks.index(max(ranks))]  # of equal ones the first
        self.timing, self.alignment = best.timing, best.alignment
        self.notices += best.notices
        self.add_frames(best.codes())
        self.add_words(best.alignment.words())
        if self._stream:
            self.add_chunk(self._model.decode(best.codes()))


def _rank(model: LoadedModel, takes: Sequence[Ticket]) -> list[tuple[int, float]]:
    """How good each take is: one with fewer faults first, then one that attends to its words more
    and that the model was surer of."""
    certainties = _certainties(model, takes)
    return [
        (-_count_faults(take), _confidence(take) + certainty)
        for take, certainty in zip(takes, certainties, strict=True)
    ]


def _count_faults(take: Ticket) -> int:
    kinds = {notice.kind for notice in take.notices}
    return sum(not word.spoken for word in take.alignment.words()) + len(kinds & _FAULTS)


def _confidence(take: Ticket) -> float:
    """The mean of all words; 0 without alignment heads."""
    words = take.alignment.words()
    return sum(word.confidence for word in words) / max(1, len(words))


def _certainties(model: LoadedModel, takes: Sequence[Ticket]) -> list[float]:
    """How sure the model was of each take, in nats: the mean log-probability of its codes and its
    end, less the mean entropy that the codes of the first codebook were drawn with.

    A text in several parts is heard as one; 0 for all if it fills the window.
    """
    speeches = [_as_given(model, take.request, take.codes()) for take in takes]
    given = [speech for speech in speeches if speech is not None]
    if len(given) < len(takes):
        return [0.0] * len(takes)
    return [_certainty(score) for score in score_speech(model, given, None, _SCORED_AT_ONCE)]


def _certainty(score: Score) -> float:
    if not len(score.codes):
        return -np.inf
    num_codes = score.log_probability.size + len(score.end_log_probability)
    return score.total / num_codes - float(score.entropy[:, 0].mean())


def _as_given(model: LoadedModel, request: Request, codes: np.ndarray) -> GivenSpeech | None:
    """The speech of a request with as much as fits the window: its beginning, and the newest turns
    of the context; None if there is no room beside the text."""
    room = model.config.backbone.max_seq_len - 1
    text = Segment(request.speaker, request.spoken_text)
    room -= Turn(text, model.config, model.tokenizer).length
    if room < 1:
        return None
    turns = [dataclasses.replace(text, codes=codes[:room])]
    room -= len(codes)
    for turn in reversed([*request.voice_turns, *request.context]):
        room -= Turn(turn, model.config, model.tokenizer).length
        if room < 0:
            break
        turns.insert(0, turn)
    return read_speech(model, turns)
