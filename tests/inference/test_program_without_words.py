"""Without alignment heads the compiled frame loop is as if there were no alignment."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from countdown import CONFIG, random_weights

from csm_jax.inference.decode_step import (
    CHUNK_FRAMES,
    GenerationState,
    TextRows,
    init_state,
    run_frames,
)
from csm_jax.model import kv_cache, layers
from csm_jax.model.csm import bind
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.normed_products import normed_products
from csm_jax.model.sampling import Sampling, SamplingParams

BATCH, LENGTH = 3, 64


def plain_attention(block, x, cache, positions, kv_length):
    """Attention that returns nothing but what it mixes."""
    config = block.attn.config
    frequencies = layers.rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    (product,) = normed_products(block.attn_norm, x, block.attn.qkv.matrix)
    heads = product.astype(x.dtype)
    heads = heads.reshape(*x.shape[:2], config.num_kv_heads, -1, config.head_dim)
    limit = cache.key.shape[3]
    rotated = layers.apply_rope(heads[..., :-1, :], positions, frequencies, limit)
    query, key, value = rotated[..., :-1, :], rotated[..., -1, :], heads[..., -1, :]
    key, value = (x.transpose(0, 2, 3, 1) for x in (key, value))
    cache = kv_cache.write(cache, key, value, start=positions[:, 0])
    slots = jnp.arange(kv_length, dtype=jnp.int32)
    visible = slots[None, None, :] <= positions[:, :, None]
    mixed, _ = layers.attention(
        query, cache.key[..., :kv_length], cache.value[..., :kv_length], visible
    )
    return block.attn.o(mixed.reshape(*x.shape[:2], -1)), cache


def plain_backbone(llama, x, cache, kv_length):
    """The stack without a way for attention to leave it."""
    offsets = jnp.arange(x.shape[1], dtype=jnp.int32)
    positions = cache.lengths[:, None] + offsets[None, :]
    new_layers = []
    for block, layer_cache in zip(llama.layers, cache.layers, strict=True):
        mixed, layer_cache = plain_attention(block, x, layer_cache, positions, kv_length)
        x = x + mixed
        x = x + block.mlp(x, block.mlp_norm)
        new_layers.append(layer_cache)
    return llama.norm(x), KVCache(tuple(new_layers), cache.lengths + x.shape[1])


def audio_columns():
    return jnp.arange(CONFIG.num_codebooks + 1, dtype=jnp.int32) < CONFIG.num_codebooks


def plain_run_frames(params, state, sampling, num_frames, pause):
    """The frame loop without text rows, heads and the bias of the end of speech."""
    model = bind(CONFIG, params)
    done_before = state.done

    def unfinished(carry):
        state, _, count = carry
        has_ended = jnp.any(state.done & ~done_before)
        return (count < num_frames) & ~jnp.all(state.done) & ~(pause & has_ended)

    def step(state):
        embedded = model.embed(state.frame[:, None], state.mask[:, None])
        hidden, cache = plain_backbone(model.backbone, embedded, state.cache, LENGTH)
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.num_frames)
        codes, _ = model.generate_frame(hidden[:, 0], keys, sampling, state.seen)
        codes = jnp.where(state.done[:, None], 0, codes)
        lengths = jnp.where(state.done, state.cache.lengths, cache.lengths)
        state = GenerationState(
            cache=cache._replace(lengths=lengths),
            frame=jnp.pad(codes, ((0, 0), (0, 1))),
            mask=jnp.broadcast_to(audio_columns()[None], state.mask.shape),
            keys=state.keys,
            num_frames=jnp.where(state.done, state.num_frames, state.num_frames + 1),
            seen=state.seen | jax.nn.one_hot(codes[:, 0], state.seen.shape[1], dtype=bool),
            done=state.done | jnp.all(codes == 0, axis=-1),
        )
        return state, codes[:, None]

    def body(carry):
        state, codes, count = carry
        state, frame = step(state)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, frame, start_index=count, axis=1)
        return state, codes, count + 1

    codes = jnp.zeros((BATCH, CHUNK_FRAMES, CONFIG.num_codebooks), jnp.int32)
    return jax.lax.while_loop(unfinished, body, (state, codes, jnp.zeros((), jnp.int32)))


def arguments():
    state = init_state(config=CONFIG, batch=BATCH, max_seq_len=LENGTH, dtype=jnp.dtype("float32"))
    sampling = SamplingParams.stack([Sampling()] * BATCH)
    return random_weights(), state, sampling, np.int32(5), np.bool_(False)


def operations(lowered) -> list[str]:
    """The lines of a program; functions that jax makes several of are numbered by their order."""
    names: dict[str, str] = {}

    def number(match: re.Match) -> str:
        return names.setdefault(match[0], f"@{len(names)}")

    # The names of outputs are those of their types.
    text = re.sub(r"jax.result_info = \S+", "", lowered.as_text())
    text = re.sub(r"@[\w.]+", number, text)
    return text.splitlines()[1:]


def test_the_program_is_that_of_a_loop_without_alignment():
    lowered = run_frames.lower(*arguments(), config=CONFIG, kv_length=LENGTH)
    plain = jax.jit(plain_run_frames, donate_argnums=1).lower(*arguments())
    assert operations(lowered) == operations(plain)


def test_the_program_has_more_to_return_with_a_head():
    """So that the comparison above can fail."""
    text = TextRows(np.zeros(BATCH, np.int32), np.zeros(BATCH, np.float32))
    lower = functools.partial(run_frames.lower, *arguments(), config=CONFIG, kv_length=LENGTH)
    outputs = [
        len(jax.tree.leaves(each.out_info)) for each in (lower(), lower(text, heads=((0, 0),)))
    ]
    assert outputs[1] == outputs[0] + 1
