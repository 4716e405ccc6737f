"""What can be changed inside a frame: pytrees of arrays by row, whose parts can be None.

What is None leaves the compiled program as if it did not exist.
"""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from csm_jax.model.layers import AnyArray, Array

Tree = TypeVar("Tree")


class ReplacedHeads(NamedTuple):
    """Attention heads of a layer whose outputs are replaced.

    Attributes:
      is_replaced: bool [B, N].
      output: float32 [B, N, H], what they give to the output projection.
    """

    is_replaced: AnyArray
    output: AnyArray


class StackChanges(NamedTuple):
    """What is changed in a stack at every new position.

    Attributes:
      added: float32 [B, D] by layer, counted from 1: what the layer passes on in addition.
      heads: by layer, counted from 0.
    """

    added: Mapping[int, AnyArray] | None = None
    heads: Mapping[int, ReplacedHeads] | None = None


NO_STACK_CHANGES = StackChanges()


class Guidance(NamedTuple):
    """How the logits of two prompts become those of a row (Ho and Salimans, 2022).

    Attributes:
      scale: float32 [B]; 0 is the second prompt, 1 the first.
      is_on: bool [B]; the other rows have the logits of their first prompt.
    """

    scale: AnyArray
    is_on: AnyArray


class FrameChanges(NamedTuple):
    """What is changed in one frame.

    Attributes:
      end_bias: float32 [B, Q], added to the logits of the end of speech, which is a frame of
        zeros: of id 0 of each codebook after codes that are all 0. -inf excludes it.
      forced: int32 [B, Q], codes that are taken instead of being drawn; -1 is drawn.
      guidance: of codebook 0; None if every row has one prompt.
      depth_guidance: of the other codebooks; None leaves the second prompts out of them.
      depth_decoder: changes inside the depth decoder; the backbone has run before.
    """

    end_bias: Array | None = None
    forced: Array | None = None
    guidance: Guidance | None = None
    depth_guidance: Guidance | None = None
    depth_decoder: StackChanges = NO_STACK_CHANGES


NO_CHANGES = FrameChanges()


def doubled(values: Tree, batch: int) -> Tree:
    """Arrays [B, ...] for a batch of as many rows, or for one that has each of them twice."""
    return jax.tree.map(lambda x: x if len(x) == batch else jnp.concatenate([x, x]), values)


def replace_heads(mixed: Array, heads: ReplacedHeads | None) -> Array:
    """The outputs of all heads of a layer [B, T, K, G, H], with those that are replaced."""
    if heads is None:
        return mixed
    batch, _, num_kv_heads, num_groups, _ = mixed.shape
    shape = batch, 1, num_kv_heads, num_groups, -1
    is_replaced = jnp.asarray(heads.is_replaced).reshape(shape)
    output = jnp.asarray(heads.output).reshape(shape).astype(mixed.dtype)
    return jnp.where(is_replaced, output, mixed)


def guide(logits: Array, guidance: Guidance | None) -> Array:
    """Logits [2 * B, V], of the first prompts and then of the second ones, as [B, V]."""
    if guidance is None:
        return logits
    first, second = jnp.split(logits, 2)
    guided = second + jnp.asarray(guidance.scale)[:, None] * (first - second)
    # Where there is no second prompt, its row holds anything.
    return jnp.where(jnp.asarray(guidance.is_on)[:, None], guided, first)
