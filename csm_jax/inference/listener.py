"""What a model makes of speech that is given to it: scores and states."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.errors import InputError
from csm_jax.inference.given_speech import read_speech, segment_of
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.request_parameters import checks_call
from csm_jax.inference.scores import Score, score_speech
from csm_jax.inference.states import Observation, States, observe_speech
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.turns import Segment


@dataclass(frozen=True, eq=False, repr=False)
class Listener(LoadedModel):
    """A loaded model that is given speech. A call that does not fit raises `InputError`."""

    @checks_call
    def score(
        self,
        text: str,
        speech: np.ndarray,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        sampling: Sampling | None = None,
    ) -> Score:
        """How likely speech is as the next turn of a conversation, code by code.

        Args:
          text: the transcript, as one turn: of a text that `generate` would split, this is not the
            probability that it was drawn with.
          speech: codes, int [F, Q], or audio, float [num_samples] at `sample_rate`.
          speaker, context: as in `Request`; nothing of the context is left out.
          sampling: the distribution that `generate` draws from with it, filters and repetition
            penalty included; None is the model's own, at temperature 1.

        Raises:
          InputError: a turn is malformed, or all together are longer than the model's window.
        """
        conversation = [*context, segment_of(text, speech, speaker)]
        return self.score_batch([conversation], sampling)[0]

    @checks_call
    def score_batch(
        self,
        conversations: Sequence[Sequence[Segment]],
        sampling: Sampling | None = None,
        max_batch: int = 8,
    ) -> list[Score]:
        """`score` of the last turn of each conversation, side by side.

        Args:
          conversations: the last turn of each has a text, and audio or codes.
          max_batch: how many of them at once.

        Raises:
          InputError: as `score`, or `max_batch` is less than 1.
        """
        if max_batch < 1:
            raise InputError(f"max_batch is {max_batch}, but must be at least 1")
        speeches = [read_speech(self, conversation) for conversation in conversations]
        return score_speech(self, speeches, sampling, max_batch)

    @checks_call
    def states(
        self,
        text: str,
        speech: np.ndarray,
        speaker: int = 0,
        context: Sequence[Segment] = (),
        *,
        backbone: Sequence[int] = (),
        backbone_attention: Sequence[int] = (),
        depth_decoder: Sequence[int] = (),
        depth_decoder_attention: Sequence[int] = (),
    ) -> States:
        """Hidden states and attention of both stacks, for speech as the next turn of a dialogue.

        The model is causal: of codes that `generate_codes` returned for a text of one part, these
        are the states that it had when it generated them.

        Args:
          text, speech, speaker, context: as for `score`.
          backbone, depth_decoder: the layers whose states are returned, 0 to the number of layers.
          backbone_attention, depth_decoder_attention: the layers whose attention is returned, 0 to
            the number of layers less 1.

        Raises:
          InputError: as `score`; or a layer that the stack does not have.
        """
        sizes = self.config
        upper = Observation.of(sizes.backbone, "backbone", backbone, backbone_attention)
        lower = Observation.of(
            sizes.depth_decoder, "depth_decoder", depth_decoder, depth_decoder_attention
        )
        conversation = [*context, segment_of(text, speech, speaker)]
        return observe_speech(self, read_speech(self, conversation), upper, lower)
