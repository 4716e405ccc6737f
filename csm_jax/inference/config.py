"""Settings of inference, which a loaded model carries with it."""

import dataclasses
from dataclasses import dataclass, field

from csm_jax.inference.guard import GuardLimits
from csm_jax.inference.text_guard import TextGuardLimits
from csm_jax.prompt.limits import PromptLimits
from csm_jax.prompt.splitting import PAUSE_SECONDS, SECONDS_PER_LETTER


@dataclass(frozen=True)
class InferenceConfig:
    """How requests are split, limited and batched, in the same way for all of them.

    Attributes:
      max_part_characters, context_seconds: as of the checkpoint's `PromptLimits`.
      pause_seconds, seconds_per_letter: they give the longest that the speech of a text can take
        (`splitting.needed_seconds`).
      guard: when speech counts as a runaway.
      text_guard: when speech counts as not following its text; used where the checkpoint has
        alignment heads.
      min_bucket: the shortest cache and prompt that programs are compiled for, in positions; the
        others are powers of two.
      max_prefixes: how many shared beginnings of prompts a batch keeps the keys and values of.
      end_bias: added to the logits of the end of speech where the model has alignment heads; 0 is
        off. For experiments.
      max_step_seconds: running requests are interrupted for others after this time, unless a
        single frame takes longer.
    """

    max_part_characters: int = PromptLimits.max_part_characters
    context_seconds: float = PromptLimits.context_seconds
    pause_seconds: float = PAUSE_SECONDS
    seconds_per_letter: float = SECONDS_PER_LETTER
    guard: GuardLimits = field(default_factory=GuardLimits)
    text_guard: TextGuardLimits = field(default_factory=TextGuardLimits)
    min_bucket: int = 32
    max_prefixes: int = 8
    end_bias: float = 0.0
    max_step_seconds: float = 0.25

    @classmethod
    def of(cls, limits: PromptLimits) -> "InferenceConfig":
        """The settings for a checkpoint with these limits."""
        return cls(**dataclasses.asdict(limits))


DEFAULT_INFERENCE = InferenceConfig()
