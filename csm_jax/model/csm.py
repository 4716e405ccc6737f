"""CSM: frames in, frames out (SesameAILabs/csm `models.py`).

A frame is a row of Q audio codes and one text id, Q + 1 columns; a mask says which count.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from csm_jax.config import CSMConfig
from csm_jax.model.changes import (
    NO_CHANGES,
    NO_STACK_CHANGES,
    FrameChanges,
    StackChanges,
    doubled,
    guide,
)
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.layers import (
    AnyArray,
    Array,
    Linear,
    Params,
    Rngs,
    linear_float32,
    lookup,
    normal,
    pack,
)
from csm_jax.model.llama import Head, Llama, Observed
from csm_jax.model.logits_functions import NO_STATES, CallStates, FrameFunctions
from csm_jax.model.normed_products import normed_products
from csm_jax.model.precision import FLOAT32, Precision, Role
from csm_jax.model.random_numbers import uniform_numbers
from csm_jax.model.sampling import LogitFilter, SamplingParams, penalize_repetition, sample


class _Depth(NamedTuple):
    """The depth decoder between two codebooks.

    Attributes:
      code: int32 [B], the code before.
      cache: its cache, whose positions are codebooks: as long as the number of the next one.
      end_bias: float32 [B, Q], of the codes to come.
      codes: int32 [B, Q], all so far; None without functions that want them.
      states: of these functions.
    """

    code: Array
    cache: KVCache
    end_bias: Array | None
    codes: Array | None
    states: tuple[Any, ...]


class CSM(nnx.Module):
    """Backbone, depth decoder, their embeddings and heads. The codec is separate.

    Attributes:
      text_embedding: [text vocabulary, D].
      audio_embedding: [Q * V, D], row `code + codebook * V`; both stacks read it.
      codebook0_head: [V, D].
      depth_heads: weight [Q - 1, V, depth D], one head per codebook 1..Q-1.
      depth_unroll: how many codebooks a pass of the compiled loop over them has.
    """

    depth_unroll = 1

    def __init__(self, config: CSMConfig, *, precision: Precision = FLOAT32, rngs: Rngs):
        self.config = config
        embed_dim, depth_dim = config.backbone.embed_dim, config.depth_decoder.embed_dim
        vocab = config.audio_vocab_size

        def embeddings(rows: int, std: float) -> nnx.Param:
            table = normal(rngs, (rows, embed_dim), std, precision.weights)
            return nnx.Param(pack(table) if precision.packs(Role.TABLE) else table)

        self.text_embedding = embeddings(config.text_vocab_size, std=1.0)
        # Q of these are summed into one input.
        audio_std = config.num_codebooks**-0.5
        self.audio_embedding = embeddings(config.num_codebooks * vocab, std=audio_std)
        self.backbone = Llama(config.backbone, precision=precision, rngs=rngs)
        self.codebook0_head = Linear(embed_dim, vocab, precision=precision, rngs=rngs)
        self.projection = Linear(embed_dim, depth_dim, precision=precision, rngs=rngs)
        self.depth_decoder = Llama(config.depth_decoder, precision=precision, rngs=rngs)
        heads = (config.num_codebooks - 1,)
        self.depth_heads = Linear(depth_dim, vocab, precision=precision, rngs=rngs, stack=heads)

    @property
    def dtype(self) -> jnp.dtype:
        """The type of activations."""
        return self.backbone.norm.scale.dtype

    def embed(self, frames: AnyArray, mask: AnyArray) -> Array:
        """Sums the embeddings of the columns that count.

        Args:
          frames: int32 [B, T, Q + 1].
          mask: bool [B, T, Q + 1].

        Returns:
          [B, T, D].
        """
        codes, text = frames[..., :-1], frames[..., -1:]
        audio = lookup(self.audio_embedding[...], codes + self._codebook_offsets())  # [B, T, Q, D]
        words = lookup(self.text_embedding[...], text)  # [B, T, 1, D]
        embeddings = jnp.concatenate([audio, words], axis=-2)
        # 33 bfloat16 terms, added in float32 as torch does.
        kept = jnp.where(mask[..., None], embeddings, 0).astype(jnp.float32)
        return jnp.sum(kept, axis=-2).astype(self.dtype)

    def advance(
        self,
        frames: Array,
        mask: Array,
        cache: KVCache,
        kv_length: int | None = None,
        heads: tuple[Head, ...] = (),
        changes: StackChanges = NO_STACK_CHANGES,
    ) -> tuple[Array, KVCache, Observed]:
        """Feeds one row of every prompt to the backbone.

        Args:
          frames, mask: int32 and bool [B, Q + 1].
          cache, kv_length, heads, changes: as for `Llama.attend`.

        Returns:
          As `Llama.attend`, the states [B, 1, D].
        """
        embedded = self.embed(frames[:, None], mask[:, None])
        return self.backbone.attend(embedded, cache, kv_length, heads, changes=changes)

    def embed_code(self, code: Array, codebook: Array | int) -> Array:
        """Embedding of one codebook's ids: int32 [B] -> [B, D]."""
        rows = code + codebook * self.config.audio_vocab_size
        return lookup(self.audio_embedding[...], rows).astype(self.dtype)

    def _codebook_offsets(self) -> Array:
        config = self.config
        offsets = jnp.arange(config.num_codebooks, dtype=jnp.int32) * config.audio_vocab_size
        return offsets[None, None, :]

    def backbone_logits(self, hidden: Array) -> Array:
        """Codebook-0 logits, float32 [..., V], of backbone states [..., D]."""
        return linear_float32(hidden, self.codebook0_head.matrix)

    def generate_frame(
        self,
        hidden: Array,
        keys: Array,
        sampling: SamplingParams,
        seen: Array,
        changes: FrameChanges = NO_CHANGES,
        functions: FrameFunctions | None = None,
        states: CallStates = NO_STATES,
    ) -> tuple[Array, CallStates]:
        """Samples one frame: codebook 0 from the backbone, the rest from the depth decoder.

        Args:
          hidden: [B, D] backbone state at the last position; with guidance [2 * B, D], of the
            first prompts and then of the second ones.
          keys: one PRNG key per row [B], for this frame alone.
          sampling: values per row.
          seen: bool [B, V], codebook-0 ids that the repetition penalty applies to.
          changes: what is changed in this frame.
          functions, states: what changes logits after guidance, and before all else.

        Returns:
          int32 [B, Q]; and the new states of the functions.
        """
        # One number decides one code.
        draw = functools.partial(uniform_numbers, length=self.config.num_codebooks)
        numbers = jax.vmap(draw, out_axes=1)(keys)  # [Q, B]
        logits = guide(self.backbone_logits(hidden), changes.guidance)
        if changes.depth_guidance is None:
            hidden = hidden[: len(logits)]
        first_states = ()
        if functions is not None:
            logits, first_states = functions.apply_first(logits, states.first)
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
        logits = _with_end_bias(logits, changes.end_bias, 0)
        first = _force(self.draw(logits, numbers, 0, sampling.backbone), changes.forced, 0)
        codes, rest_states = self._sample_depth(
            hidden, first, numbers, sampling, changes, functions, states.rest
        )
        return codes, CallStates(first_states, rest_states)

    def _sample_depth(
        self,
        hidden: Array,
        first: Array,
        numbers: Array,
        sampling: SamplingParams,
        changes: FrameChanges,
        functions: FrameFunctions | None,
        states: tuple[Any, ...],
    ) -> tuple[Array, tuple[Any, ...]]:
        """Codebooks 1..Q-1 given codebook 0, drawn by numbers [Q, B]: all codes [B, Q]."""
        num_codebooks, num_rows = self.config.num_codebooks, len(hidden)
        stack_changes = doubled(changes.depth_decoder, num_rows)

        def after(code: Array, codebook: Array | int, before: _Depth) -> _Depth:
            codes = None if before.codes is None else before.codes.at[:, codebook].set(code)
            return before._replace(
                code=code, end_bias=_where_zero(before.end_bias, code), codes=codes
            )

        def next_code(inputs: Array, before: _Depth, codebook: Array) -> _Depth:
            product, cache = self.depth_step(inputs, before.cache, stack_changes)
            logits = guide(product, changes.depth_guidance)
            new_states = ()
            if functions is not None:
                logits, new_states = functions.apply_rest(
                    logits, before.states, codebook, before.codes
                )
            logits = _with_end_bias(logits, before.end_bias, codebook)
            code = self.draw(logits, numbers, codebook, sampling.depth_decoder)
            code = _force(code, changes.forced, codebook)
            return after(code, codebook, before._replace(cache=cache, states=new_states))

        def body(before: _Depth, _: None) -> tuple[_Depth, Array]:
            # To look it up in an array of all takes a GPU a kernel more.
            codebook = before.cache.lengths[0]
            inputs = self.depth_input(doubled(before.code, num_rows), codebook)
            depth = next_code(inputs, before, codebook)
            return depth, depth.code

        embedded = doubled(self.embed_code(first, 0), num_rows)
        inputs = self.projection(jnp.stack([hidden, embedded], axis=1))  # [B, 2, depth D]
        cache = self.depth_cache(num_rows, stack_changes)
        no_codes = functions.no_codes() if functions and functions.calls.rest else None
        depth = after(first, 0, _Depth(first, cache, changes.end_bias, no_codes, states))
        depth = next_code(inputs, depth, jnp.int32(1))
        second = depth.code
        depth, rest = jax.lax.scan(
            body, depth, None, length=num_codebooks - 2, unroll=self.depth_unroll
        )
        codes = jnp.concatenate([first[None], second[None], rest])
        return codes.T, depth.states

    def draw(
        self, logits: Array, numbers: Array, codebook: Array | int, values: LogitFilter
    ) -> Array:
        """Codes int32 [B] of logits [B, V], drawn by the codebook's numbers of [Q, B]."""
        return sample(logits, numbers[codebook], values)

    def depth_input(self, code: Array, codebook: Array) -> Array:
        """The depth decoder's input for a codebook, of the code before: int32 [B] -> [B, 1, D]."""
        return self.projection(self.embed_code(code, codebook - 1)[:, None])

    def depth_cache(self, num_rows: int, changes: StackChanges = NO_STACK_CHANGES) -> KVCache:
        """The depth decoder's cache before the steps of a frame, which `changes` are given to."""
        del changes
        config, capacity = self.config.depth_decoder, self.config.num_codebooks
        return KVCache.create(config, num_rows, capacity, self.dtype, num_lengths=1)

    def depth_step(
        self, inputs: Array, cache: KVCache, changes: StackChanges = NO_STACK_CHANGES
    ) -> tuple[Array, KVCache]:
        """Logits of the codebook at the last of T new positions.

        Args:
          inputs: [B, T, depth D]; position 0 has the backbone's state, and position q > 0 the code
            of codebook q - 1.
          cache: of the positions before, all rows alike.
          changes: what is changed at the new positions.

        Returns:
          float32 [B, V]; and the cache with the new positions.
        """
        hidden, after, _ = self.depth_decoder.attend(
            inputs, cache, changes=changes, final_norm=False
        )
        # The codebook of position q > 0 is q, and its head the one before.
        index = cache.lengths[0] + (inputs.shape[1] - 2)
        head = jax.tree.map(lambda table: lookup(table, index), self.depth_heads.matrix)
        (product,) = normed_products(self.depth_decoder.norm, hidden[:, -1:], head)
        return product[:, 0], after

    def hidden(self, frames: AnyArray, mask: AnyArray, remat: bool = False) -> Array:
        """Teacher-forced backbone: states [B, T, D] of rows that begin with these frames.

        Args:
          frames, mask: as for `embed`; padded on the right.
          remat: as for `Llama.__call__`.
        """
        return self.attend(frames, mask, remat=remat)[0]

    def attend(
        self,
        frames: AnyArray,
        mask: AnyArray,
        heads: Sequence[Head] = (),
        layers: Sequence[int] = (),
        remat: bool = False,
    ) -> tuple[Array, Observed]:
        """Like `hidden`, and returns what `Llama.attend` does of some heads and layers."""
        batch, length, _ = frames.shape
        cache = KVCache.create(self.config.backbone, batch, length, self.dtype, num_lengths=1)
        embedded = self.embed(frames, mask)
        states, _, observed = self.backbone.attend(embedded, cache, None, heads, layers, remat)
        return states, observed

    def depth_logits(self, hidden: Array, codes: AnyArray, remat: bool = False) -> Array:
        """Teacher-forced depth decoder.

        Args:
          hidden: [B, D] backbone states that predict the frames.
          codes: int32 [B, Q], the frames.
          remat: as for `Llama.__call__`.

        Returns:
          float32 [B, Q - 1, V], logits of codebooks 1..Q-1 given those before.
        """
        states, _ = self.depth_attend(hidden, codes, remat=remat)
        by_codebook = jax.vmap(linear_float32, in_axes=(1, 0), out_axes=1)
        heads = jax.tree.map(
            lambda table: lookup(table, jnp.arange(len(table), dtype=jnp.int32)),
            self.depth_heads.matrix,
        )
        return by_codebook(states[:, 1:], heads)

    def depth_attend(
        self,
        hidden: Array,
        codes: AnyArray,
        heads: Sequence[Head] = (),
        layers: Sequence[int] = (),
        remat: bool = False,
    ) -> tuple[Array, Observed]:
        """The states that `depth_logits` are from, and what `Llama.attend` returns of some others.

        Returns:
          [B, Q, depth D]: position 0 has the backbone's state, position q > 0 predicts codebook q.
        """
        offsets = self._codebook_offsets()[0, :, :-1]
        embedded = lookup(self.audio_embedding[...], codes[:, :-1] + offsets)  # [B, Q - 1, D]
        inputs = jnp.concatenate([hidden[:, None], embedded.astype(self.dtype)], axis=1)
        cache = KVCache.create(
            self.config.depth_decoder, len(codes), inputs.shape[1], hidden.dtype, num_lengths=1
        )
        projected = self.projection(inputs)
        states, _, observed = self.depth_decoder.attend(
            projected, cache, None, heads, layers, remat
        )
        return states, observed


def _with_end_bias(logits: Array, end_bias: Array | None, codebook: Array | int) -> Array:
    """Logits [B, V] with the bias [B, Q] of this codebook's id 0, if there is one."""
    return logits if end_bias is None else logits.at[:, 0].add(end_bias[:, codebook])


def _force(code: Array, forced: Array | None, codebook: Array | int) -> Array:
    """The code [B], or the one of `forced` [B, Q] for this codebook where that is not -1."""
    if forced is None:
        return code
    wanted = forced[:, codebook]
    return jnp.where(wanted < 0, code, wanted)


def _where_zero(end_bias: Array | None, code: Array) -> Array | None:
    """The bias of rows whose code [B] is 0; no other frame can become the end of speech."""
    return None if end_bias is None else jnp.where(code[:, None] == 0, end_bias, 0)


def bind(config: CSMConfig, params: Params, kind: type[CSM] = CSM) -> CSM:
    """The model over a pure dictionary of parameters, for use inside a jitted function."""
    return nnx.merge(_graph(config, "weight_scale" in params["projection"], kind), params)


@functools.cache
def _graph(config: CSMConfig, int8: bool, kind: type[CSM]) -> nnx.GraphDef[CSM]:
    """The module tree without parameters: of a precision, only whether it is int8 matters here."""
    return nnx.graphdef(abstract(config, dataclasses.replace(FLOAT32, int8=int8), kind))


@functools.cache
def abstract(config: CSMConfig, precision: Precision, kind: type[CSM] = CSM) -> CSM:
    """The module tree with shapes for weights: nothing is allocated."""
    return nnx.eval_shape(lambda: kind(config, precision=precision, rngs=None))
