"""CSM: frames in, frames out (SesameAILabs/csm `models.py`).

A frame is a row of Q audio codes and one text id, Q + 1 columns; a mask says which count.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from csm_jax.cache import KVCache
from csm_jax.config import CSMConfig
from csm_jax.layers import Linear, linear_float32
from csm_jax.llama import Llama
from csm_jax.sampling import SamplingParams, penalise_repetition, sample

Array = jax.Array


class CSM(nnx.Module):
    """Backbone, depth decoder, their embeddings and heads. The codec is separate.

    Attributes:
      text_embedding: [text vocabulary, D].
      audio_embedding: [Q * V, D], row `code + codebook * V`; both stacks read it.
      codebook0_head: [V, D].
      depth_heads: [Q - 1, V, depth D], one per codebook 1..Q-1.
    """

    def __init__(self, config: CSMConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        embed_dim, depth_dim = config.backbone.embed_dim, config.depth_decoder.embed_dim
        vocab = config.audio_vocab_size

        def weights(*shape: int, std: float) -> nnx.Param:
            return nnx.Param(nnx.initializers.normal(std)(rngs.params(), shape, dtype))

        self.text_embedding = weights(config.text_vocab_size, embed_dim, std=1.0)
        # Q of these are summed into one input.
        audio_std = config.num_codebooks**-0.5
        self.audio_embedding = weights(config.num_codebooks * vocab, embed_dim, std=audio_std)
        self.backbone = Llama(config.backbone, dtype=dtype, rngs=rngs)
        self.codebook0_head = Linear(embed_dim, vocab, dtype=dtype, rngs=rngs)
        self.projection = Linear(embed_dim, depth_dim, dtype=dtype, rngs=rngs)
        self.depth_decoder = Llama(config.depth_decoder, dtype=dtype, rngs=rngs)
        heads = (config.num_codebooks - 1, vocab, depth_dim)
        self.depth_heads = weights(*heads, std=depth_dim**-0.5)

    @property
    def dtype(self) -> jnp.dtype:
        return self.codebook0_head.weight.dtype

    def embed(self, frames: Array, mask: Array) -> Array:
        """Sums the embeddings of the columns that count.

        Args:
          frames: int32 [B, T, Q + 1].
          mask: bool [B, T, Q + 1].

        Returns:
          [B, T, D].
        """
        codes, text = frames[..., :-1], frames[..., -1:]
        audio = self.audio_embedding[...][codes + self._codebook_offsets()]  # [B, T, Q, D]
        words = self.text_embedding[...][text]  # [B, T, 1, D]
        embeddings = jnp.concatenate([audio, words], axis=-2)
        # 33 bfloat16 terms, added in float32 as torch does.
        kept = jnp.where(mask[..., None], embeddings, 0).astype(jnp.float32)
        return jnp.sum(kept, axis=-2).astype(self.dtype)

    def embed_code(self, code: Array, codebook: Array | int) -> Array:
        """Embedding of one codebook's ids: int32 [B] -> [B, D]."""
        return self.audio_embedding[...][code + codebook * self.config.audio_vocab_size]

    def _codebook_offsets(self) -> Array:
        config = self.config
        offsets = jnp.arange(config.num_codebooks, dtype=jnp.int32) * config.audio_vocab_size
        return offsets[None, None, :]

    def backbone_logits(self, hidden: Array) -> Array:
        """Codebook-0 logits, float32 [..., V], of backbone states [..., D]."""
        return linear_float32(hidden, self.codebook0_head.weight[...])

    def generate_frame(
        self, hidden: Array, keys: Array, sampling: SamplingParams, seen: Array
    ) -> Array:
        """Samples one frame: codebook 0 from the backbone, the rest from the depth decoder.

        Args:
          hidden: [B, D] backbone state at the last position.
          keys: one PRNG key per row [B], for this frame alone.
          sampling: values per row.
          seen: bool [B, V], codebook-0 ids that the repetition penalty applies to.

        Returns:
          int32 [B, Q].
        """
        num_codebooks = self.config.num_codebooks
        keys = jax.vmap(lambda key: jax.random.split(key, num_codebooks), out_axes=1)(keys)
        logits = self.backbone_logits(hidden)
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
        first = sample(logits, keys[0], sampling.backbone)
        return self._sample_depth(hidden, first, keys[1:], sampling)

    def _sample_depth(
        self, hidden: Array, first: Array, keys: Array, sampling: SamplingParams
    ) -> Array:
        """Codebooks 1..Q-1 given codebook 0; keys [Q - 1, B]. Returns all codes [B, Q]."""
        config = self.config.depth_decoder
        num_codebooks = self.config.num_codebooks
        heads = self.depth_heads[...]

        def next_code(inputs: Array, cache: KVCache, head: Array, keys: Array):
            states, cache = self.depth_decoder(self.projection(inputs), cache)
            code = sample(linear_float32(states[:, -1], head), keys, sampling.depth_decoder)
            return code, cache

        def body(carry: tuple[Array, KVCache], xs: tuple[Array, Array, Array]):
            code, cache = carry
            codebook, head, keys = xs
            inputs = self.embed_code(code, codebook)[:, None]  # [B, 1, D]
            code, cache = next_code(inputs, cache, head, keys)
            return (code, cache), code

        # The cache is empty at every frame: its positions are codebooks, not frames.
        cache = KVCache.create(config, len(first), num_codebooks, hidden.dtype)
        inputs = jnp.stack([hidden, self.embed_code(first, 0)], axis=1)  # [B, 2, D]
        second, cache = next_code(inputs, cache, heads[0], keys[0])
        codebooks = jnp.arange(1, num_codebooks - 1, dtype=jnp.int32)
        _, rest = jax.lax.scan(body, (second, cache), (codebooks, heads[1:], keys[1:]))
        return jnp.concatenate([first[None], second[None], rest]).T

    def depth_logits(self, hidden: Array, codes: Array) -> Array:
        """Teacher-forced depth decoder.

        Args:
          hidden: [B, D] backbone states that predict the frames.
          codes: int32 [B, Q], the frames.

        Returns:
          float32 [B, Q - 1, V], logits of codebooks 1..Q-1 given those before.
        """
        offsets = self._codebook_offsets()[0, :, :-1]
        embedded = self.audio_embedding[...][codes[:, :-1] + offsets]  # [B, Q - 1, D]
        inputs = jnp.concatenate([hidden[:, None], embedded], axis=1)  # [B, Q, D]
        cache = KVCache.create(self.config.depth_decoder, len(codes), inputs.shape[1], hidden.dtype)
        states, _ = self.depth_decoder(self.projection(inputs), cache)
        by_codebook = jax.vmap(linear_float32, in_axes=(1, 0), out_axes=1)
        return by_codebook(states[:, 1:], self.depth_heads[...])


def bind(config: CSMConfig, params: dict[str, Any]) -> CSM:
    """The model over a pure dictionary of parameters, for use inside a jitted function."""
    dtype = params["codebook0_head"]["weight"].dtype
    return nnx.merge(nnx.graphdef(abstract(config, dtype)), params)


@functools.cache
def abstract(config: CSMConfig, dtype: jnp.dtype) -> CSM:
    """The module tree with shapes for weights: nothing is allocated."""
    return nnx.eval_shape(lambda: CSM(config, dtype=dtype, rngs=nnx.Rngs(0)))
