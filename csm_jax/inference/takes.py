"""Several takes of a request, of which the best is kept.

The takes are requests like any other, so they are generated side by side, each with a seed of its
own.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from csm_jax.errors import CSMError, first_line
from csm_jax.inference.given_speech import GivenSpeech
from csm_jax.inference.history import History
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request import Notice, OnWord, Request
from csm_jax.inference.request_state import RequestState
from csm_jax.inference.scores import Score, score_speech
from csm_jax.inference.take import Take
from csm_jax.inference.ticket import Ticket
from csm_jax.prompt.turns import Segment, join_rows, text_rows, turn_rows

# Takes whose attention over the window is in memory at once.
_SCORED_AT_ONCE = 4

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
    """The seeds of the takes: that of the request, and of take i, counted from 0,
    `np.random.SeedSequence([seed % 2**32, 0, 0, i]).generate_state(1)[0]`."""
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

    _tickets: Sequence[Ticket] = ()

    def start(self, tickets: Sequence[Ticket]) -> None:
        """Waits for the takes in a thread.

        The engine's own has other requests; and it is no daemon, because an interpreter that exits
        during a computation crashes.
        """
        self._tickets = tickets
        threading.Thread(target=self._run, name="csm_jax.takes").start()

    def cancel(self) -> None:
        super().cancel()
        for ticket in self._tickets:
            ticket.cancel()

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
        for ticket in self._tickets:
            ticket.codes()
        takes = _as_takes(self._model, self._tickets)
        ranks = [self.request.rank(take) for take in takes]
        # Sorting keeps equal ones in their order, also in reverse.
        order = sorted(range(len(takes)), key=ranks.__getitem__, reverse=True)
        self.takes = tuple(takes[index] for index in order)
        best = self._tickets[order[0]]
        self.timing, self.alignment = best.timing, best.alignment
        self.notices += best.notices
        self.add_frames(best.codes())
        self.add_words(best.alignment.words())
        if self._stream:
            self.add_chunk(self._model.decode(best.codes()))


def _as_takes(model: LoadedModel, tickets: Sequence[Ticket]) -> list[Take]:
    scores = functools.cache(functools.partial(_scores, model, tickets))

    def take(index: int, ticket: Ticket) -> Take:
        words, notices = tuple(ticket.alignment.words()), tuple(ticket.notices)
        seed = ticket.request.seed
        return Take(seed, ticket.codes(), words, notices, model.decode, lambda: scores()[index])

    return [take(index, ticket) for index, ticket in enumerate(tickets)]


def _scores(model: LoadedModel, takes: Sequence[Ticket]) -> Sequence[Score | None]:
    """The score of each take; a text in several parts is heard as one."""
    speeches = [_as_given(model, take.request, take.codes()) for take in takes]
    given = [speech for speech in speeches if speech is not None]
    # They have one text, so either all of them fit or none.
    return score_speech(model, given, None, _SCORED_AT_ONCE) or [None] * len(takes)


def _as_given(model: LoadedModel, request: Request, codes: np.ndarray) -> GivenSpeech | None:
    """The speech of a request with as much of its beginning and of the context as fits the window;
    None if there is no room beside the text."""
    config, tokenizer = model.config, model.tokenizer
    history = History(model, request, config.backbone.max_seq_len, lambda notice: None)
    text = text_rows(request.spoken_text, request.speaker, config, tokenizer)
    room = history.make_room(len(text.frames), max(1, len(codes)))
    if room < 1:
        return None
    codes = codes[:room]
    spoken = Segment(request.speaker, request.spoken_text, codes=codes)
    prompt = join_rows([*history.rows(), *turn_rows(spoken, config, tokenizer)])
    return GivenSpeech(prompt, codes, len(text.frames))
