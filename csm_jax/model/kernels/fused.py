"""The model with fused kernels in its steps of one position.

It has the plain model's parameters and gives its codes, up to rounding.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax.model.changes import NO_STACK_CHANGES, StackChanges
from csm_jax.model.csm import CSM
from csm_jax.model.kernels import attention, products
from csm_jax.model.kernels.draw import sample
from csm_jax.model.kernels.products import Positions
from csm_jax.model.kv_cache import KVCache, LayerCache
from csm_jax.model.layers import Array
from csm_jax.model.llama import Block, Head, Llama, Observed
from csm_jax.model.sampling import LogitFilter

logger = logging.getLogger("csm_jax")


class FusedCSM(CSM):
    """A model whose steps of one position run in fused kernels."""

    # A pass of the loop has two kernels of its own.
    depth_unroll = 10

    def advance(
        self,
        frames: Array,
        mask: Array,
        cache: KVCache,
        kv_length: int | None = None,
        heads: tuple[Head, ...] = (),
        changes: StackChanges = NO_STACK_CHANGES,
    ) -> tuple[Array, KVCache, Observed]:
        if heads or changes.added or changes.heads:
            _tell("the backbone runs in XLA's kernels where its attention or states are asked for")
            return super().advance(frames, mask, cache, kv_length, heads, changes)
        inputs = self.embed(frames[:, None], mask[:, None])[:, 0]
        positions = Positions(cache.lengths, 1)
        states, layers = run_blocks(self.backbone, inputs, cache.layers, positions)
        length = kv_length or cache.layers[0].value.shape[3]
        nothing = Observed(np.zeros((len(states), 0, 1, length), np.float32), ())
        states = self.backbone.norm(states[:, None])
        return states, KVCache(layers, cache.lengths + 1), nothing

    def draw(
        self, logits: Array, numbers: Array, codebook: Array | int, values: LogitFilter
    ) -> Array:
        index = jnp.full((1,), codebook, jnp.int32) if isinstance(codebook, int) else codebook[None]
        return sample(logits, numbers, index, values)

    def depth_input(self, code: Array, codebook: Array) -> Array:
        vocabulary, matrix = self.config.audio_vocab_size, self.projection.matrix
        table = self.audio_embedding[...]
        return products.embedded_product(code, table, matrix, codebook[None], vocabulary)[:, None]

    def depth_cache(self, num_rows: int, changes: StackChanges = NO_STACK_CHANGES) -> KVCache:
        if changes.added or changes.heads:
            return super().depth_cache(num_rows, changes)
        # Not zeros: unlike the plain path, the kernels read no position that was not written.
        cache = jax.eval_shape(functools.partial(super().depth_cache, num_rows))
        layers = jax.tree.map(lambda x: jax.lax.empty(x.shape, x.dtype), cache.layers)
        return KVCache(layers, jnp.zeros(cache.lengths.shape, jnp.int32))

    def depth_step(
        self, inputs: Array, cache: KVCache, changes: StackChanges = NO_STACK_CHANGES
    ) -> tuple[Array, KVCache]:
        if changes.added or changes.heads:
            _tell("the depth decoder runs in XLA's kernels where its states are changed")
            return super().depth_step(inputs, cache, changes)
        batch, length, dim = inputs.shape
        rows, positions = inputs.reshape(batch * length, dim), Positions(cache.lengths, length)
        states, layers = run_blocks(self.depth_decoder, rows, cache.layers, positions)
        logits, lengths = products.normed_logits(
            states, self.depth_decoder.norm, self.depth_heads.matrix, positions
        )
        return logits, KVCache(layers, lengths)


def run_blocks(
    llama: Llama, x: Array, layers: tuple[LayerCache, ...], positions: Positions
) -> tuple[Array, tuple[LayerCache, ...]]:
    """Passes rows [B * T, D] through the blocks of a stack."""
    caches = []
    for block, cache in zip(llama.layers, layers, strict=True):
        x, cache = _run_block(block, x, cache, positions)
        caches.append(cache)
    return x, tuple(caches)


def _run_block(
    block: Block, x: Array, cache: LayerCache, positions: Positions
) -> tuple[Array, LayerCache]:
    config, attn, mlp = block.attn.config, block.attn, block.mlp
    query, cache = attention.normed_qkv(
        x, block.attn_norm, attn.qkv.matrix, cache, positions, config
    )
    x = attention.attention_output(query, cache, attn.o.matrix, x, positions, config)
    units = products.gated_units(x, block.mlp_norm, mlp.gate.matrix, mlp.up.matrix)
    return products.product_and_residual(units, mlp.down.matrix, x), cache


@functools.cache
def _tell(remark: str) -> None:
    """Warns, once, of what the kernels do not do."""
    logger.warning("kernels=pallas: %s", remark)
