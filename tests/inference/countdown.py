"""Prompts, and weights: random ones, and those of a model that counts down."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax import config
from csm_jax.checkpoints.random_weights import random_params
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.turns import Prompt

CONFIG = config.tiny()
VOCAB, NUM_CODEBOOKS = CONFIG.audio_vocab_size, CONFIG.num_codebooks
GREEDY = Sampling(greedy=True)


def make_prompt(length: int, seed: int = 0, tiny: config.CSMConfig = CONFIG):
    """A prompt of text, audio and text."""
    rng = np.random.default_rng(seed)
    is_audio = (np.arange(length) > length // 3) & (np.arange(length) < length - 2)
    columns = np.arange(tiny.num_codebooks + 1) < tiny.num_codebooks
    mask = is_audio[:, None] == columns[None, :]
    frames = rng.integers(0, tiny.audio_vocab_size, size=mask.shape, dtype=np.int32)
    return Prompt(np.where(mask, frames, 0).astype(np.int32), mask)


PROMPTS = [make_prompt(length, seed=length) for length in (5, 18, 31)]
SAMPLED = [Sampling(), Sampling(temperature=1.3, top_p=0.9), Sampling(top_k=5, min_p=0.05)]


@functools.cache
def random_weights():
    return random_params(CONFIG)["csm"]


def blank_heads(params):
    heads = "codebook0_head", "depth_heads"
    return params | {name: jax.tree.map(jnp.zeros_like, params[name]) for name in heads}


# The weights of a model that counts down: attention and MLP add nothing, an id is a unit vector,
# and so is its successor in the head. After text n it generates frames of n - 1, n - 2, ... and,
# at 0, the end of speech.


def countdown(first=None, depth=()):
    """Weights of the counting model.

    Args:
      first: {id: id that codebook 0 has in the next frame}, where it is not one less.
      depth: {(codebook, id before): id}, where a codebook does not repeat the one before it.
    """
    params = jax.tree.map(jnp.zeros_like, random_weights())
    for stack in ("backbone", "depth_decoder"):
        norm = {"scale": jnp.ones_like(params[stack]["norm"]["scale"])}
        params[stack] = params[stack] | {"norm": norm}
    embed_dim, depth_dim = CONFIG.backbone.embed_dim, CONFIG.depth_decoder.embed_dim
    codes = np.eye(VOCAB, embed_dim, dtype=np.float32)
    params["audio_embedding"] = jnp.asarray(np.tile(codes, (NUM_CODEBOOKS, 1)))
    params["text_embedding"] = params["text_embedding"].at[:VOCAB].set(codes)
    params["projection"] = {"weight": jnp.eye(depth_dim, embed_dim)}
    successors = {code: code - 1 for code in range(1, VOCAB)} | {0: 0} | (first or {})
    head = np.zeros((VOCAB, embed_dim), np.float32)
    head[list(successors.values()), list(successors.keys())] = 1.0
    params["codebook0_head"] = {"weight": jnp.asarray(head)}
    heads = np.tile(np.eye(VOCAB, depth_dim, dtype=np.float32), (NUM_CODEBOOKS - 1, 1, 1))
    for (codebook, before), code in dict(depth).items():
        heads[codebook - 1, :, before] = 0.0
        heads[codebook - 1, code, before] = 1.0
    params["depth_heads"] = {"weight": jnp.asarray(heads)}
    return params


def count_from(count: int):
    """A prompt after which the counting model generates `count - 1` first."""
    frames, mask = np.zeros((2, 3, NUM_CODEBOOKS + 1), np.int32)
    frames[:, -1] = [20, 30, count]
    mask[:, -1] = 1
    return Prompt(frames, mask.astype(bool))


def counted(count: int) -> np.ndarray:
    return np.repeat(np.arange(count - 1, 0, -1), NUM_CODEBOOKS).reshape(-1, NUM_CODEBOOKS)
