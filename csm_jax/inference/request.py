"""Requests for speech, and what a caller is called with beside the speech."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from csm_jax.errors import InputError
from csm_jax.inference.alignment.words import Word
from csm_jax.inference.interventions import NO_CHANGE, Interventions
from csm_jax.inference.notices import Notice
from csm_jax.inference.take import Rank, rank_take
from csm_jax.inference.voice import Voice
from csm_jax.io.arguments import fill_defaults, real_number, whole_number
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.pauses import split_pauses
from csm_jax.prompt.turns import Segment, check_text

GUARD = ("on", "off")
DEFAULT_SAMPLING = Sampling()
MAX_TAKES = 16

logger = logging.getLogger("csm_jax")


@dataclass(frozen=True)
class Request:
    """A text to speak as the next turn of a conversation, and how to speak it.

    None stands for the default of every field but `text`. Whole numbers may be integers of numpy
    or jax.

    Attributes:
      text: of any length; beyond about 300 characters it is split at sentences, and each part is
        spoken with the last parts before it as context.
      speaker: number of the voice; the same number as in `context` continues that voice.
      context: the turns so far, oldest first. If they outgrow the model's window, some are left
        out, with a notice. What fixes the voice stays: turns with `pinned`, or the first of each
        speaker; and of the others the newest, `context_seconds` of them.
      sampling: how codes are drawn.
      max_audio_length_ms: the speech is cut at this length, with a notice, if it has not ended by
        itself. None is the model's own limit (10 s, and 90 s for MisoTTS), or what the text can
        need if that is more.
      seed: the same seed and arguments give the same speech.
      guard: "on" or True stops speech that repeats itself, falls silent or does not end; "off" or
        False leaves it alone, as greedy sampling always does.
      shared_turns: how many of the first turns of the context are the same in other requests, such
        as the sample of a voice: an `Engine` prefills them once.
      pauses: whether `[pause:0.5s]` and the other marks of `prompt/pauses.py` are silences of that
        length, which the model hears before it speaks on. Without it they are text like any other.
      best_of: how many takes are generated side by side, each with another seed, of which the best
        is kept (`takes.py`). The first has the seed of the request, and the others those of
        `takes.take_seeds`.
      interventions: what is changed while the speech is generated.
      context_seconds: of the newest speech that stay in the context, besides what fixes the voice,
        where not everything does: for parts after the first of a long text, and if the context
        does not fit. None is the model's, 30 s; inf is all that fits.
      voice: turns before the context, whose keys and values are known already (`Generator.
        make_voice`): they are not prefilled, and stay.
      rank: a function of a `Take`, of which `best_of` keeps the one with the highest value, and of
        equal ones the first. The built-in one is `rank_take`.
    """

    text: str
    speaker: int = 0
    context: Sequence[Segment] = ()
    sampling: Sampling = DEFAULT_SAMPLING
    max_audio_length_ms: float | None = None
    seed: int = 0
    guard: str | bool = "on"
    shared_turns: int = 0
    pauses: bool = False
    best_of: int = 1
    interventions: Interventions = NO_CHANGE
    context_seconds: float | None = None
    voice: Voice | None = None
    rank: Rank = rank_take

    def __post_init__(self):
        fill_defaults(self)
        check_text(self.text)
        check_text(self.spoken_text)
        for name in ("speaker", "seed", "shared_turns", "best_of"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        if self.max_audio_length_ms is not None:
            milliseconds = real_number(self.max_audio_length_ms, "max_audio_length_ms")
            object.__setattr__(self, "max_audio_length_ms", milliseconds)
        if self.context_seconds is not None:
            object.__setattr__(self, "context_seconds", _seconds(self.context_seconds))
        object.__setattr__(self, "context", _turns(self.context))
        if not isinstance(self.sampling, Sampling):
            raise InputError(f"sampling is of type {type(self.sampling).__name__}, not Sampling")
        if not isinstance(self.interventions, Interventions):
            kind = type(self.interventions).__name__
            raise InputError(f"interventions is of type {kind}, not Interventions")
        if self.voice is not None and not isinstance(self.voice, Voice):
            raise InputError(f"voice is of type {type(self.voice).__name__}, not Voice")
        if self.voice is not None and self.shared_turns:
            raise InputError("voice and shared_turns do not go together: a voice is shared itself")
        if not isinstance(self.pauses, bool):
            raise InputError(f"pauses is {self.pauses!r}, but must be True or False")
        if not callable(self.rank):
            raise InputError(
                f"rank is of type {type(self.rank).__name__}, not a function of a Take"
            )
        if isinstance(self.guard, bool):
            object.__setattr__(self, "guard", "on" if self.guard else "off")
        if self.guard not in GUARD:
            raise InputError(f"guard is {self.guard}, but must be {' or '.join(GUARD)}")
        if not 0 <= self.shared_turns <= len(self.context):
            raise InputError(
                f"shared_turns is {self.shared_turns}, but there are {len(self.context)} turns"
            )
        if not 1 <= self.best_of <= MAX_TAKES:
            raise InputError(f"best_of is {self.best_of}, but must be from 1 to {MAX_TAKES}")

    @property
    def voice_turns(self) -> tuple[Segment, ...]:
        """The turns of the voice, which come before the context."""
        return () if self.voice is None else self.voice.turns

    @property
    def spoken_text(self) -> str:
        """The transcript of the speech: the text without the marks of pauses that it has."""
        return split_pauses(self.text).text if self.pauses else self.text

    @property
    def pause_seconds(self) -> float:
        """The length of all pauses that the text asks for."""
        return split_pauses(self.text).seconds if self.pauses else 0.0


def _seconds(value: Any) -> float:
    seconds = real_number(value, "context_seconds")
    if not seconds >= 0:
        raise InputError(f"context_seconds is {seconds:g}, but must be at least 0")
    return seconds


def _turns(context: Any) -> Sequence[Segment]:
    """A context as a sequence of segments. Raises `InputError` for one that is none."""
    is_list = isinstance(context, Iterable) and not isinstance(context, str | bytes | dict)
    turns = context if isinstance(context, Sequence) else tuple(context) if is_list else None
    if turns is None or not all(isinstance(turn, Segment) for turn in turns):
        raise InputError(
            "context must be a list of turns, [csm_jax.Segment(speaker, text, audio), ...]"
        )
    return turns


def as_request(text: str | Request, **fields: Any) -> Request:
    """A request for a text, or a request with other values in some fields."""
    if isinstance(text, Request):
        return dataclasses.replace(text, **fields)
    return Request(text, **fields)


# Is given every notice as it arises.
Notify = Callable[[Notice], None]
# Is given every word as soon as its times are certain.
OnWord = Callable[[Word], None]
# Is called now and then with the number of frames generated so far.
Progress = Callable[[int], None]


def log_notice(notice: Notice) -> None:
    """Logs a notice as a warning: the `Notify` of callers that give none."""
    logger.warning(notice.message)
