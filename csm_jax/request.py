"""What a caller asks for, and what it is told beside the speech."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from csm_jax.errors import InputError
from csm_jax.prompt import Segment, check_text
from csm_jax.sampling import Sampling

GUARD = ("on", "off")
DEFAULT_MAX_AUDIO_LENGTH_MS = 10_000
DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True)
class Request:
    """What to say, and how.

    Attributes:
      text: of any length; beyond about 300 characters it is split at sentences, and each part is
        spoken with the parts before it as context.
      speaker: whose turn it is; the same number as in `context` continues that voice.
      context: the turns so far, oldest first. If they outgrow the model's window, the oldest are
        left out, with a notice.
      sampling: how codes are drawn.
      max_audio_length_ms: the speech is cut there, with a notice, if it has not ended by itself.
        None is 10 s, or what the text can need if that is more.
      seed: the same seed and arguments give the same speech.
      guard: "on" stops speech that repeats itself, falls silent or will not end; "off" leaves it
        alone, as greedy sampling always does.
      shared_turns: how many of the first turns of the context other requests have too, such as the
        sample of a voice: an `Engine` reads them once.
    """

    text: str
    speaker: int = 0
    context: Sequence[Segment] = ()
    sampling: Sampling = DEFAULT_SAMPLING
    max_audio_length_ms: float | None = None
    seed: int = 0
    guard: str = "on"
    shared_turns: int = 0

    def __post_init__(self):
        check_text(self.text)
        if self.guard not in GUARD:
            raise InputError(f"guard is {self.guard}, but must be {' or '.join(GUARD)}")
        if not 0 <= self.shared_turns <= len(self.context):
            raise InputError(
                f"shared_turns is {self.shared_turns}, but there are {len(self.context)} turns"
            )


def as_request(*arguments: Any, **named: Any) -> Request:
    """A `Request` from what `generate` takes: one already, or its arguments."""
    if len(arguments) == 1 and isinstance(arguments[0], Request):
        return dataclasses.replace(arguments[0], **named)
    return Request(*arguments, **named)


@dataclass(frozen=True)
class Notice:
    """Something that the listener should know of the speech.

    Attributes:
      kind: "cut", "nothing_said", "context_dropped", "resampled" or "guard_cut".
      message: the same in words.
    """

    kind: str
    message: str
