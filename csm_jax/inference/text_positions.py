"""Where the texts of a batch lie in its cache: the attention to them, and their ends."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.model.layers import AnyArray, Array

# Positions of a text whose attention is returned, at most; a part of a text has fewer tokens.
TEXT_POSITIONS = 512
# Added to a logit, it leaves every other code without a chance.
_CERTAIN = np.float32(1e6)


class TextRows(NamedTuple):
    """Where the text that each row speaks lies, and what to do about its end.

    Attributes:
      start: int32 [B], its first position in the cache.
      end_bias: float32 [B], added to the logits of the end of speech, as for `CSM.generate_frame`:
        below 0 in all codebooks, above 0 in codebook 0 alone, after whose 0 the others then follow.
    """

    start: AnyArray
    end_bias: AnyArray


def end_bias(text: TextRows | None, num_codebooks: int) -> Array | None:
    """float32 [B, Q]."""
    if text is None:
        return None
    bias = jnp.asarray(text.end_bias)[:, None]
    # An end that has begun is completed: a raised 0 before other codes would be noise, not an end.
    is_rest = jnp.arange(num_codebooks, dtype=jnp.int32)[None] > 0
    return jnp.where(is_rest & (bias > 0), _CERTAIN, bias)


def text_weights(weights: AnyArray, text: TextRows) -> Array:
    """The part of weights [B, N, S] that belongs to the text: [B, N, L]."""
    length = min(weights.shape[-1], TEXT_POSITIONS)
    # Where the text begins near the end of the cache, what lies beyond is 0.
    padded = jnp.pad(weights, ((0, 0), (0, 0), (0, length)))
    take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=length, axis=1)
    return jax.vmap(take)(padded, text.start)
