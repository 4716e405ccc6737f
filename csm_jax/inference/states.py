"""Hidden states and attention of both stacks, for given speech, in one pass."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from csm_jax.config import CSMConfig, LlamaConfig
from csm_jax.errors import InputError
from csm_jax.inference.buckets import bucket
from csm_jax.inference.given_speech import GivenRows, GivenSpeech, pad_rows
from csm_jax.inference.loaded_model import LoadedModel
from csm_jax.model.csm import bind
from csm_jax.model.layers import Params
from csm_jax.model.llama import Head, Observed
from csm_jax.model.teacher_forcing import frames_from


@dataclass(frozen=True, eq=False)
class NamedArray:
    """An array whose axes have names; numpy's functions take it as it is.

    Attributes:
      values: float32.
      axes: a name for each axis of `values`.
    """

    values: np.ndarray
    axes: tuple[str, ...]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype) if copy else np.asarray(self.values, dtype)


@dataclass(frozen=True, eq=False)
class States:
    """What both stacks computed for given speech.

    Layers have transformers' numbers. Of states, 0 is what goes into the stack, i is what comes out
    of layer i, counted from 1, and the last one is taken after the final norm. Of attention, layers
    are counted from 0.

    The backbone's positions are those of the conversation, of which the last one is the end of
    speech; frame f has position `start + f` and is predicted at the position before. The depth
    decoder's positions are 0, which has the backbone's state, and one for each codebook q > 0,
    where q is predicted and its predecessor was fed.

    Attributes:
      backbone: [layer, position, channel], of the chosen layers in their order.
      backbone_attention: [layer, head, position, attended].
      depth_decoder: [layer, frame, codebook, channel].
      depth_decoder_attention: [layer, frame, head, codebook, attended].
      start: the position of the first frame.
      num_text: positions of the text, which are those before the first frame.
    """

    backbone: NamedArray
    backbone_attention: NamedArray
    depth_decoder: NamedArray
    depth_decoder_attention: NamedArray
    start: int
    num_text: int


class Observation(NamedTuple):
    """The heads and layers of a stack to return, as in `Llama.attend`."""

    heads: tuple[Head, ...] = ()
    layers: tuple[int, ...] = ()

    @staticmethod
    def of(
        stack: LlamaConfig, name: str, layers: Sequence[int], attention: Sequence[int]
    ) -> "Observation":
        """All heads of some layers, and states.

        Raises:
          InputError: the stack `name` does not have a layer.
        """
        _check(name, layers, stack.num_layers, "states")
        _check(f"{name}_attention", attention, stack.num_layers - 1, "attention")
        heads = tuple((layer, head) for layer in attention for head in range(stack.num_heads))
        return Observation(heads, tuple(layers))


NOTHING = Observation()


def _check(name: str, layers: Sequence[int], last: int, kind: str) -> None:
    for layer in layers:
        if not 0 <= layer <= last:
            raise InputError(f"{name} is {list(layers)}, but {kind} have layers 0 to {last}")


def observe_speech(
    model: LoadedModel, speech: GivenSpeech, backbone: Observation, depth: Observation
) -> States:
    """The states and the attention that were chosen of each stack."""
    config, length, size = model.config, len(speech.prompt.frames), len(speech.codes)
    upper, lower = jax.device_get(
        observe(
            model.params,
            pad_rows([speech], 1),
            config=config,
            num_frames=bucket(size),
            backbone=backbone,
            depth=depth,
        )
    )
    states = [layer[0, :length] for layer in upper.states]
    attention = upper.attention[0, :, :length, :length]
    depth_states = [layer[:size] for layer in lower.states]
    depth_attention = lower.attention[:size]
    return States(
        _named(_stack(states, (length, config.backbone.embed_dim)), "layer position channel"),
        _named(_by_layer(attention, config.backbone), "layer head position attended"),
        _named(
            _stack(depth_states, (size, config.num_codebooks, config.depth_decoder.embed_dim)),
            "layer frame codebook channel",
        ),
        _named(
            _by_layer(depth_attention.swapaxes(0, 1), config.depth_decoder).swapaxes(1, 2),
            "layer frame head codebook attended",
        ),
        speech.start,
        speech.num_text,
    )


def _named(values: np.ndarray, axes: str) -> NamedArray:
    return NamedArray(values.astype(np.float32), tuple(axes.split()))


def _stack(layers: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Arrays of this shape as [layer, ...]."""
    return np.stack(layers) if layers else np.zeros((0, *shape), np.float32)


def _by_layer(heads: np.ndarray, stack: LlamaConfig) -> np.ndarray:
    """All heads of some layers, [layer * head, ...], as [layer, head, ...]."""
    count = stack.num_heads
    return heads.reshape(len(heads) // count, count, *heads.shape[1:])


@functools.partial(jax.jit, static_argnames=("config", "num_frames", "backbone", "depth"))
def observe(
    params: Params,
    rows: GivenRows,
    *,
    config: CSMConfig,
    num_frames: int = 1,
    backbone: Observation = NOTHING,
    depth: Observation = NOTHING,
) -> tuple[Observed, Observed]:
    """Runs both stacks over given speech; computes only what leads to what is returned.

    Args:
      num_frames: of the depth decoder, from each row's start on.

    Returns:
      What was chosen of the backbone, [B, ...]; and of the depth decoder, [B * num_frames, ...].
    """
    model = bind(config, params)
    hidden, upper = model.attend(rows.frames, rows.mask, *backbone)
    states, codes = frames_from(hidden, rows.frames, rows.start, num_frames)
    _, lower = model.depth_attend(
        states.reshape(-1, states.shape[-1]), codes.reshape(-1, codes.shape[-1]), *depth
    )
    return upper, lower
