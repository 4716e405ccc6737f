"""Sizes of an `Engine`, apart from those that a caller chooses for a request."""

from dataclasses import dataclass

from csm_jax.errors import InputError


@dataclass(frozen=True)
class EngineConfig:
    """How many requests an engine runs, and how many can wait.

    Attributes:
      max_batch: slots, the requests that run at once. A step takes as long for one request as for
        all of them.
      max_seq_len: positions of a slot, prompt and speech together; the model has a limit too.
      max_queue: requests that can wait for a slot, and as many again in the background.
      kept_rows: slots, fewer than all, that only shares without a slot get.
      kept_beside_others: the same, while several shares ask for slots.

    Raises:
      InputError: one of the first three is less than 1.
    """

    max_batch: int = 8
    max_seq_len: int = 2048
    max_queue: int = 64
    kept_rows: int = 0
    kept_beside_others: int = 0

    def __post_init__(self):
        for name in ("max_batch", "max_seq_len", "max_queue"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}, but must be at least 1")
