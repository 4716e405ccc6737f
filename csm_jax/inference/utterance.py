"""Utterances: what a decode batch generates in one of its slots."""

from typing import NamedTuple

import numpy as np

from csm_jax.inference.interventions import LogitsFunction
from csm_jax.inference.row_interventions import NO_STACK_INTERVENTIONS, StackInterventions
from csm_jax.inference.voice import Voice
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.turns import Prompt


class UtteranceGuidance(NamedTuple):
    """The second prompt of an utterance, and how its logits count.

    Attributes:
      prompt: the same frames follow it.
      num_shared: as of `Utterance`.
      scale: float32 [R], by frame; the last one goes on.
      depth_decoder: whether codebooks 1 and up are guided too.
    """

    prompt: Prompt
    num_shared: int
    scale: np.ndarray
    depth_decoder: bool


class Utterance(NamedTuple):
    """A prompt, and how the frames after it are generated.

    Attributes:
      prompt: what the backbone is prefilled with.
      sampling: how codes are drawn.
      seed: a whole number, of which the lowest 32 bits count.
      max_frames: the most frames that are generated.
      num_shared: positions at the beginning of the prompt that other prompts have too, fewer than
        all: they are prefilled on their own, and their keys and values are kept.
      num_text: positions at the end of the prompt, which are the text that is spoken.
      end_bias: as for `FrameChanges`; a batch without alignment heads ignores it.
      forced: int32 [R, Q], codes of its first frames that are given; -1 is drawn.
      backbone, depth_decoder: what is changed inside of them, in arrays without a batch axis.
      guidance: None if the logits are those of the prompt alone.
      logits, depth_logits: functions of logits, as of `Interventions`; states are arrays.
      voice: has the keys and values of the shared positions; None if they are to be prefilled.
    """

    prompt: Prompt
    sampling: Sampling
    seed: int
    max_frames: int
    num_shared: int = 0
    num_text: int = 0
    end_bias: float = 0.0
    forced: np.ndarray | None = None
    backbone: StackInterventions = NO_STACK_INTERVENTIONS
    depth_decoder: StackInterventions = NO_STACK_INTERVENTIONS
    guidance: UtteranceGuidance | None = None
    voice: Voice | None = None
    logits: LogitsFunction | None = None
    depth_logits: LogitsFunction | None = None

    @property
    def max_length(self) -> int:
        """Positions of the longest prompt and of all frames."""
        prompts = [self.prompt, *([self.guidance.prompt] if self.guidance else [])]
        return max(len(prompt.frames) for prompt in prompts) + self.max_frames


class Rewind(NamedTuple):
    """Where an utterance continues from.

    Attributes:
      codes: int32 [n, Q], its first frames.
      seed: of what follows.
      end_bias: of what follows, in addition to that of the utterance.
    """

    codes: np.ndarray
    seed: int
    end_bias: float = 0.0
