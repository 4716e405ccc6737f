"""Notices: what a caller is told beside the speech."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """A remark about the speech of a request, such as that it was cut.

    Attributes:
      kind: "cut", "nothing_said", "context_dropped", "silent_context"; of the guard "resampled",
        "guard_cut", "continued" (an early end was not taken) or "ended" (what followed the last
        word was not).
      message: the same as a sentence.
    """

    kind: str
    message: str
