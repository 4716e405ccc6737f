"""Interventions of a request as the arrays of its utterances; all that do not fit are refused."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.config import CSMConfig, LlamaConfig
from csm_jax.errors import InputError, first_line
from csm_jax.inference.interventions import (
    GUIDED,
    STACKS,
    Guidance,
    HeadOutput,
    Interventions,
    LogitsFunction,
    Steering,
)
from csm_jax.inference.row_interventions import StackInterventions, SteeredLayer
from csm_jax.io.arguments import real_number, whole_number
from csm_jax.model.changes import ReplacedHeads
from csm_jax.model.logits_functions import CodeStep


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


def stack_interventions(
    interventions: Interventions, stack: str, config: CSMConfig
) -> StackInterventions:
    """What is changed inside a stack, one of `STACKS`, in arrays without a batch axis.

    Raises:
      InputError: a stack, layer, head or vector is none of the model's.
    """
    for each in (*interventions.steering, *interventions.heads):
        if each.stack not in STACKS:
            raise InputError(f"stack is {each.stack}, expected {' or '.join(STACKS)}")
    sizes = config.backbone if stack == "backbone" else config.depth_decoder
    steering = [each for each in interventions.steering if each.stack == stack]
    heads = [each for each in interventions.heads if each.stack == stack]
    return StackInterventions(_steered_layers(steering, sizes), _replaced_heads(heads, sizes))


def _steered_layers(steering: Sequence[Steering], sizes: LlamaConfig) -> Mapping[int, SteeredLayer]:
    layers: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for each in steering:
        layer = _within(each.layer, "layer of steering", 1, sizes.num_layers)
        vector = _vector(each.vector, "vector of steering", sizes.embed_dim)
        strength = by_frame(each.strength, "strength of steering")
        if not np.isfinite(np.abs(strength).max() * vector).all():
            raise InputError("vector and strength of steering must be finite")
        layers.setdefault(layer, []).append((vector, strength))
    return {layer: _steered(vectors) for layer, vectors in layers.items()}


def _steered(vectors: Sequence[tuple[np.ndarray, np.ndarray]]) -> SteeredLayer:
    longest = max(len(strength) for _, strength in vectors)
    if longest == 1:
        # One vector whatever their number, for which no other program is needed.
        total = np.sum([strength * vector for vector, strength in vectors], axis=0)
        return SteeredLayer(total[None], np.ones((1, 1), np.float32))
    index = np.arange(longest)
    strengths = [strength[np.minimum(index, len(strength) - 1)] for _, strength in vectors]
    return SteeredLayer(np.stack([vector for vector, _ in vectors]), np.stack(strengths, axis=1))


def _replaced_heads(heads: Sequence[HeadOutput], sizes: LlamaConfig) -> Mapping[int, ReplacedHeads]:
    layers: dict[int, ReplacedHeads] = {}
    shape = sizes.num_heads, sizes.head_dim
    for each in heads:
        layer = _within(each.layer, "layer of a head", 0, sizes.num_layers - 1)
        head = _within(each.head, "head", 0, sizes.num_heads - 1)
        nothing = ReplacedHeads(np.zeros(shape[:1], bool), np.zeros(shape, np.float32))
        is_replaced, output = layers.setdefault(layer, nothing)
        is_replaced[head] = True
        if each.output is not None:
            output[head] = _vector(each.output, "output of a head", sizes.head_dim)
    return layers


def _within(value: int, name: str, least: int, most: int) -> int:
    number = whole_number(value, name)
    if not least <= number <= most:
        raise InputError(f"{name} is {number}, but must be from {least} to {most}")
    return number


def _vector(values: np.ndarray, name: str, dim: int) -> np.ndarray:
    """float32 [dim]."""
    vector = np.asarray(values, np.float32)
    if vector.shape != (dim,):
        raise InputError(f"{name} has shape {list(vector.shape)}, expected [{dim}]")
    if not np.isfinite(vector).all():
        raise InputError(f"{name} must be finite")
    return vector


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


def logits_function(function: LogitsFunction | None, config: CSMConfig) -> LogitsFunction | None:
    """The function, traced once for a check, with a state of arrays.

    Raises:
      InputError: it is none, fails, or returns something else than it is given.
    """
    if function is None:
        return None
    if not isinstance(function, LogitsFunction) or not callable(function.function):
        raise InputError(f"{function!r} is no LogitsFunction of a function")
    code, codes = jnp.int32(0), jnp.zeros(config.num_codebooks, jnp.int32)
    step = CodeStep(frame=code, codebook=code, codes=codes, previous=codes)
    logits = jax.ShapeDtypeStruct((config.audio_vocab_size,), np.float32)
    try:
        hash(function.function)
        state = jax.tree.map(jnp.asarray, function.state)
        returned = jax.eval_shape(function.function, logits, state, step)
    except Exception as error:
        raise InputError(f"the function of logits failed: {first_line(error)}") from error
    given = jax.eval_shape(lambda *arguments: arguments, logits, state)
    if jax.tree.map(_kind, returned) != jax.tree.map(_kind, given):
        raise InputError(
            f"the function of logits returns {_shown(returned)}, expected {_shown(given)}"
        )
    return LogitsFunction(function.function, state)


def _kind(array: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], str]:
    return array.shape, str(array.dtype)


def _shown(tree: Any) -> str:
    return str(jax.tree.map(lambda array: f"{array.dtype}{list(array.shape)}", tree))


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


def stack_from_frame(stack: StackInterventions, frame: int) -> StackInterventions:
    """What is left of the changes inside a stack from one frame of the speech on."""
    steering = {
        layer: each._replace(strengths=from_frame(np.asarray(each.strengths), frame))
        for layer, each in stack.steering.items()
    }
    return stack._replace(steering=steering)


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
