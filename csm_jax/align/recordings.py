"""Attention of a model that hears a recording and its transcript: teacher-forced, for any heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.inference.alignment.speech import PartAlignment
from csm_jax.inference.alignment.words import Word
from csm_jax.inference.given_speech import pad_rows, read_speech
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.inference.states import Observation, observe
from csm_jax.model.llama import Head
from csm_jax.prompt.turns import Segment


@dataclass(frozen=True)
class Recording:
    """Speech and its transcript.

    Attributes:
      text: what is said.
      audio: float [num_samples] at the model's sample rate.
      speaker: number of the voice.
      starts: seconds at which the words (`words.word_spans`) start; None if that is not known.
    """

    text: str
    audio: np.ndarray
    speaker: int = 0
    starts: Sequence[float] | None = None


def attention_to(model: LoadedModel, recording: Recording, heads: tuple[Head, ...]) -> np.ndarray:
    """How much the heads attend to the text when they predict each frame of a recording.

    Returns:
      float32 [F, N, L], as the frame step returns it.

    Raises:
      InputError: the text is empty, or the audio is not what it should be.
    """
    segment = Segment(recording.speaker, recording.text, recording.audio)
    speech = read_speech(model, [segment])
    rows = pad_rows([speech], 1)
    chosen, _ = observe(model.params, rows, config=model.config, backbone=Observation(heads))
    weights = np.asarray(chosen.attention)[0]  # [N, T, S]
    predicting = slice(speech.start - 1, speech.start - 1 + len(speech.codes))
    return weights[:, predicting, : speech.num_text].transpose(1, 0, 2)


def align(model: LoadedModel, recording: Recording) -> list[Word]:
    """The words of a recording and when they are spoken.

    Raises:
      InputError: the model has no alignment heads; and what `attention_to` raises.
    """
    alignment = model.check_alignment()
    part = PartAlignment(
        recording.text, recording.speaker, model.tokenizer, alignment, model.config, start=0
    )
    part.push(attention_to(model, recording, alignment.heads))
    return part.words(len(part.tracker), recording.audio, model.sample_rate)
