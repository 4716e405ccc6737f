"""A conversation: turns spoken one after another, each with all earlier turns as its context."""

from collections.abc import Iterable, Iterator

import numpy as np

from csm_jax.inference.engine import Engine
from csm_jax.inference.generator import Generator
from csm_jax.inference.request import DEFAULT_SAMPLING, Notify, Progress, Request, log_notice
from csm_jax.inference.speech import Speech
from csm_jax.inference.take import Rank, rank_take
from csm_jax.inference.ticket import Ticket
from csm_jax.inference.voice import Voice
from csm_jax.io.arguments import whole_number
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.turns import Segment

NUM_SEEDS = 2**32


class Conversation:
    """Turns spoken one after another, each with all earlier turns as its context.

        conversation = csm_jax.Conversation(model, seed=1)
        conversation.add(csm_jax.Segment(speaker=0, text="Who is there?", audio=recording))
        answer = conversation.speak("It is me.", speaker=1)
        for chunk in conversation.stream("Come in.", speaker=0):
            play(chunk)

    The codes of a spoken turn are the context of the next one: to encode its audio again would
    change them. Nothing is left out here; of turns that outgrow the model's window, a request keeps
    those that fix a voice (`Segment.pinned`) and the newest others, with a notice. Not thread-safe:
    a turn ends before the next begins.

    Attributes:
      turns: the turns so far, oldest first. A caller may remove some.
      seed: of the first turn that is spoken. The n-th has `seed + n - 1`, modulo 2^32, unless it
        is given its own; turns that are added by `add` do not count.
      num_spoken: turns that have been spoken.
      last_speech: of the turn that was spoken last, with its words; None before the first, and
        after one that was not heard to its end.
      sampling, max_audio_length_ms, guard, pauses, best_of, context_seconds, voice, rank: of all
        turns, as of a `Request`.
    """

    def __init__(
        self,
        model: Generator | Engine,
        turns: Iterable[Segment] | None = (),
        *,
        seed: int | None = 0,
        sampling: Sampling | None = DEFAULT_SAMPLING,
        max_audio_length_ms: float | None = None,
        guard: str | bool | None = "on",
        pauses: bool = False,
        best_of: int = 1,
        context_seconds: float | None = None,
        voice: Voice | None = None,
        rank: Rank = rank_take,
    ):
        """Begins a conversation.

        Args:
          model: a `Generator` speaks each turn alone, an `Engine` beside its other requests.
          turns: earlier turns, oldest first.
        """
        self._model = model
        self.turns = list(turns or ())
        self.seed = 0 if seed is None else whole_number(seed, "seed")
        self.num_spoken = 0
        self.last_speech: Speech | None = None
        self.sampling = sampling or DEFAULT_SAMPLING
        self.max_audio_length_ms = max_audio_length_ms
        self.guard = "on" if guard is None else guard
        self.pauses = pauses
        self.best_of = best_of
        self.context_seconds = context_seconds
        self.voice = voice
        self.rank = rank

    @property
    def next_seed(self) -> int:
        """The seed of the next turn that is spoken."""
        return (self.seed + self.num_spoken) % NUM_SEEDS

    def add(self, turn: Segment) -> None:
        """Adds a turn that was not spoken here, such as a recording of the user."""
        self.turns.append(turn)

    def add_spoken(self, text: str, speaker: int, codes: np.ndarray) -> None:
        """Adds a turn that was spoken by other means than `speak` and `stream`.

        Args:
          codes: int32 [num_frames, Q], the frames that were played.
        """
        self.turns.append(Segment(speaker, text, codes=codes))
        self.num_spoken += 1
        self.last_speech = None

    def request(self, text: str, speaker: int = 0, *, seed: int | None = None) -> Request:
        """The request of the next turn; it does not change the conversation.

        Args:
          seed: None is `next_seed`.

        Raises:
          InputError: as `Request`.
        """
        return Request(
            text,
            speaker,
            tuple(self.turns),
            self.sampling,
            self.max_audio_length_ms,
            self.next_seed if seed is None else seed,
            self.guard,
            pauses=self.pauses,
            best_of=self.best_of,
            context_seconds=self.context_seconds,
            voice=self.voice,
            rank=self.rank,
        )

    def speak(
        self,
        text: str,
        speaker: int = 0,
        *,
        seed: int | None = None,
        progress: Progress | None = None,
        notify: Notify | None = None,
    ) -> np.ndarray:
        """Speaks the next turn as a whole.

        Args:
          seed: None is `next_seed`.
          progress: as for `Generator.generate`; an `Engine` does not call it.
          notify: called with each notice; by default notices are logged as warnings.

        Returns:
          float32 [num_samples]. Its codes are those of the last of `turns`.

        Raises:
          CSMError: as `Generator.generate` or `Engine.submit`; then no turn is added.
        """
        request = self.request(text, speaker, seed=seed)
        if isinstance(self._model, Engine):
            ticket = self._model.submit(request, stream=False, wait=True)
            speech = ticket.speech()
            _report(ticket, notify)
        else:
            options = {"progress": progress, "notify": notify or log_notice}
            speech = self._model.speak(request, **options)
        self.add_spoken(request.spoken_text, speaker, speech.codes)
        self.last_speech = speech
        return speech.audio

    def stream(
        self,
        text: str,
        speaker: int = 0,
        *,
        seed: int | None = None,
        notify: Notify | None = None,
    ) -> Iterator[np.ndarray]:
        """Like `speak`, but yields the speech as it is generated, float32 [n].

        The request is made with the first chunk, and the turn is added after the last one. If the
        iterator is closed earlier, the turn has the frames that were yielded.
        """
        request = self.request(text, speaker, seed=seed)
        if isinstance(self._model, Engine):
            yield from self._stream(self._model, request, notify)
        else:
            with Engine(self._model, max_batch=1) as engine:
                yield from self._stream(engine, request, notify)

    def _stream(
        self, engine: Engine, request: Request, notify: Notify | None
    ) -> Iterator[np.ndarray]:
        ticket = engine.submit(request, wait=True)
        num_samples = 0
        try:
            for chunk in ticket:
                num_samples += len(chunk)
                yield chunk
        except GeneratorExit:
            ticket.cancel()
            yielded = ticket.codes_so_far()[: num_samples // engine.model.codec.frame_size]
            self.add_spoken(request.spoken_text, request.speaker, yielded)
            raise
        _report(ticket, notify)
        self.add_spoken(request.spoken_text, request.speaker, ticket.codes())
        self.last_speech = ticket.speech()


def _report(ticket: Ticket, notify: Notify | None) -> None:
    for notice in ticket.notices:
        (notify or log_notice)(notice)
