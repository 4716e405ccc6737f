"""Interventions: what a caller changes while speech is generated."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm_jax.config import CSMConfig
from csm_jax.errors import InputError
from csm_jax.io.arguments import real_number, whole_number

GUIDED = ("text", "context")


@dataclass(frozen=True, eq=False)
class Steering:
    """A vector that is added to what a layer of the backbone passes on (activation steering).

    It is added at every frame, from the last position of the prompt on; the context and the text
    are processed without it.

    Attributes:
      layer: counted from 1, as in `States.backbone`; of the last one before the final norm.
      vector: float [D], such as the difference of the mean states of two kinds of speech.
      strength: how many times the vector is added; 0 changes nothing, negative ones subtract it.
    """

    layer: int
    vector: np.ndarray
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Guidance:
    """Classifier-free guidance: codes are drawn from the logits of two prompts.

    They are unconditional + scale * (conditional - unconditional), where the conditional prompt is
    that of the request, and the unconditional one lacks its text or its context (Ho and Salimans,
    2022). Repetition penalty, temperature and filters come after. The same frames follow both.

    Attributes:
      scale: 1 is the plain distribution, 0 the unconditional one, and above 1 the request counts
        for more. float, or float [R] for the frames of the speech, of which the last one goes on.
      over: "text" leaves the words of the text out, and keeps the tag of its speaker; "context"
        leaves out all turns before, and the parts before of a long text.
      depth_decoder: whether codebooks 1 and up are guided too, or codebook 0 alone.
    """

    scale: float | np.ndarray
    over: str = "text"
    depth_decoder: bool = True


@dataclass(frozen=True, eq=False)
class Interventions:
    """What is changed in the frames of a request; None of everything changes nothing.

    Attributes:
      forced: int [R, Q], codes that are given instead of drawn, frame by frame from the first on;
        -1 is drawn. Whole frames are continued, single codebooks or frames are filled in. Speech
        does not end before the last given code, unless that is in a frame of zeros at the end,
        which ends it there. The text must be short enough for one part, and have no pauses; the
        guard is off.
      steering: vectors that are added; those of one layer add up.
      guidance: of text or context. It takes a second row of the batch.
    """

    forced: np.ndarray | None = None
    steering: Sequence[Steering] = ()
    guidance: Guidance | None = None


NO_CHANGE = Interventions()


def forced_codes(interventions: Interventions, config: CSMConfig) -> np.ndarray | None:
    """The given codes, int32 [R, Q], up to the last frame with any; None without them.

    Raises:
      InputError: they are no codes of the model.
    """
    if interventions.forced is None:
        return None
    codes, limit = np.asarray(interventions.forced), config.audio_vocab_size
    if codes.ndim != 2 or codes.shape[1] != config.num_codebooks:
        raise InputError(
            f"forced has shape {list(codes.shape)}, expected [num_frames, {config.num_codebooks}]"
        )
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"forced has dtype {codes.dtype}, expected whole numbers")
    if codes.size and not -1 <= codes.min() <= codes.max() < limit:
        raise InputError(
            f"forced ranges {codes.min()}..{codes.max()}, expected 0..{limit - 1}, or -1 to draw"
        )
    ends = np.flatnonzero((codes == 0).all(axis=-1))
    if len(ends) and ends[0] < len(codes) - 1:
        raise InputError(
            f"frame {ends[0]} of forced is the end of speech, which only the last one can be"
        )
    given = np.flatnonzero((codes >= 0).any(axis=-1))
    return codes[: given[-1] + 1].astype(np.int32) if len(given) else None


def steering_vectors(
    interventions: Interventions, config: CSMConfig
) -> dict[int, np.ndarray] | None:
    """What is added to each layer, float32 [D]; None without steering.

    Raises:
      InputError: a layer or a vector is none of the model's.
    """
    num_layers, dim = config.backbone.num_layers, config.backbone.embed_dim
    vectors: dict[int, np.ndarray] = {}
    for steering in interventions.steering:
        layer = whole_number(steering.layer, "layer of steering")
        if not 1 <= layer <= num_layers:
            raise InputError(f"layer of steering is {layer}, but must be from 1 to {num_layers}")
        vector = np.asarray(steering.vector, np.float32)
        if vector.shape != (dim,):
            raise InputError(f"vector of steering has shape {list(vector.shape)}, expected [{dim}]")
        scaled = np.float32(real_number(steering.strength, "strength of steering")) * vector
        if not np.isfinite(scaled).all():
            raise InputError("vector and strength of steering must be finite")
        vectors[layer] = vectors.get(layer, np.float32(0)) + scaled
    return vectors or None


def guidance_scale(interventions: Interventions) -> np.ndarray | None:
    """The scale by frame, float32 [R]; None without guidance.

    Raises:
      InputError: the guidance is none.
    """
    guidance = interventions.guidance
    if guidance is None:
        return None
    if not isinstance(guidance, Guidance):
        raise InputError(f"guidance is of type {type(guidance).__name__}, not Guidance")
    if guidance.over not in GUIDED:
        raise InputError(f"guidance is over {guidance.over}, expected {' or '.join(GUIDED)}")
    return by_frame(guidance.scale, "scale of guidance")


def by_frame(value: float | np.ndarray, name: str) -> np.ndarray:
    """A number, or one for each frame, as float32 [R].

    Raises:
      InputError: it is neither, or not finite.
    """
    values = np.asarray(value) if np.ndim(value) else np.asarray([real_number(value, name)])
    if values.ndim != 1 or not values.size or values.dtype.kind not in "iuf":
        raise InputError(
            f"{name} has shape {list(values.shape)}, expected a number or [num_frames]"
        )
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"{name} must be finite")
    return values


def from_frame(values: np.ndarray, frame: int) -> np.ndarray:
    """What is left of values by frame [R], the last of which goes on, from one frame on."""
    return values[min(frame, len(values) - 1) :]


def check_room(forced: np.ndarray, num_parts: int, num_pauses: int, max_frames: int) -> None:
    """Checks that speech with given codes [R, Q] is one part, and long enough for them.

    Raises:
      InputError: it is not.
    """
    if num_parts > 1 or num_pauses:
        raise InputError(
            "codes are forced, but the text has pauses or is longer than one part: shorten it"
        )
    num_frames = len(forced) - bool((forced[-1] == 0).all())
    if num_frames > max_frames:
        raise InputError(
            f"forced has {num_frames} frames, but the speech has at most {max_frames}: raise "
            "max_audio_length_ms, or give less context"
        )
