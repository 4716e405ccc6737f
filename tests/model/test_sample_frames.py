"""Frames: every codebook is drawn from the model's logits, given the codebooks before it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sampling_oracle import (
    ACCEPTED,
    OFF,
    drawn,
    filtered_probabilities,
    filters,
    p_value,
    repeat,
)
from scipy import stats

from csm_jax import config
from csm_jax.checkpoints.random_weights import random_params
from csm_jax.model.changes import Guidance, guide
from csm_jax.model.csm import CSM
from csm_jax.model.sampling import Sampling, SamplingParams

FRAMES = 8192


@pytest.fixture(scope="module")
def model() -> CSM:
    tiny = config.tiny()
    graph = nnx.graphdef(nnx.eval_shape(lambda: CSM(tiny, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, random_params(tiny)["csm"])


def draw_frames(model: CSM, hidden, sampling: Sampling, seen=None) -> np.ndarray:
    """Frames [FRAMES, Q], each with its own key and all with one backbone state [D]."""
    vocab = model.config.audio_vocab_size
    seen = np.zeros(vocab, bool) if seen is None else seen
    keys = jax.random.split(jax.random.key(9), FRAMES)
    params = repeat(SamplingParams.stack([sampling]), FRAMES)
    batch = [np.broadcast_to(x, (FRAMES, *x.shape)) for x in (hidden, seen)]
    codes, _ = jax.jit(model.generate_frame)(batch[0], keys, params, batch[1])
    return np.asarray(codes)


def test_sampled_frames_match_the_logits_of_the_model(model):
    """Every codebook is tested given those before it, with the depth decoder's sampling values."""
    sampling = Sampling(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, depth_temperature=1.3, depth_top_k=9
    )
    hidden = jax.random.normal(jax.random.key(10), (model.config.backbone.embed_dim,))
    codes = draw_frames(model, hidden, sampling)
    first = filtered_probabilities(model.backbone_logits(hidden), sampling)
    assert p_value(codes[:, 0], first) > ACCEPTED

    batch = jnp.broadcast_to(hidden, (FRAMES, *hidden.shape))
    depth = np.asarray(jax.jit(model.depth_logits)(batch, codes))
    values = dataclasses.replace(sampling, temperature=1.3, top_k=9)
    wrong = dataclasses.replace(values, temperature=sampling.temperature)
    assert p_value(codes[:, 1], filtered_probabilities(depth[:, 0], wrong)) < ACCEPTED
    for codebook in range(1, codes.shape[1]):
        expected = filtered_probabilities(depth[:, codebook - 1], values)
        assert p_value(codes[:, codebook], expected) > ACCEPTED

    # Codebook 1 also has a plain chi-square test, given the likeliest id of codebook 0.
    given = codes[:, 0] == first.argmax()
    expected = filtered_probabilities(depth[given, 0][0], values)
    assert p_value(codes[given, 1], expected) > ACCEPTED


def test_the_repetition_penalty_applies_to_codebook_0_only(model):
    sampling = Sampling(temperature=1.0, top_k=35, repetition_penalty=1.5)
    hidden = jax.random.normal(jax.random.key(11), (model.config.backbone.embed_dim,))
    seen = np.arange(model.config.audio_vocab_size) % 2 == 0
    codes = draw_frames(model, hidden, sampling, seen)
    logits = np.asarray(model.backbone_logits(hidden))
    penalized = np.where(logits > 0, logits / 1.5, logits * 1.5)
    expected = filtered_probabilities(np.where(seen, penalized, logits), sampling)
    assert p_value(codes[:, 0], expected) > ACCEPTED
    assert p_value(codes[:, 0], filtered_probabilities(logits, sampling)) < ACCEPTED
    batch = jnp.broadcast_to(hidden, (FRAMES, *hidden.shape))
    depth = np.asarray(jax.jit(model.depth_logits)(batch, codes))[:, 0]
    assert p_value(codes[:, 1], filtered_probabilities(depth, sampling)) > ACCEPTED


def test_guided_codes_match_the_combined_logits_of_two_states(model):
    """A scale of 0 is the second distribution, of 1 the first; a row without guidance too."""
    hidden = jax.random.normal(jax.random.key(12), (2, model.config.backbone.embed_dim))
    logits = model.backbone_logits(hidden)
    scales = np.repeat(np.float32([0, 1, 2.5, 2.5]), FRAMES // 4)
    is_on = np.arange(FRAMES) < 3 * FRAMES // 4
    combined = jax.jit(guide)(jnp.repeat(logits, FRAMES, axis=0), Guidance(scales, is_on))
    uniform = np.random.default_rng(13).random(FRAMES, np.float32)
    codes = np.asarray(drawn(combined, uniform, repeat(filters(OFF), FRAMES)))
    first, second = np.asarray(logits)
    distributions = [second, first, second + 2.5 * (first - second), first]
    for part, each in zip(np.split(codes, 4), distributions, strict=True):
        assert p_value(part, filtered_probabilities(each, OFF)) > ACCEPTED
    assert p_value(codes[: FRAMES // 4], filtered_probabilities(first, OFF)) < ACCEPTED


def test_codebooks_use_different_random_numbers(model):
    """With constant logits, every pair of codebooks is uniform over all pairs of ids."""
    graph, state = nnx.split(model)
    state["codebook0_head"]["weight"][...] *= 0
    state["depth_heads"]["weight"][...] *= 0
    blank = nnx.merge(graph, state)
    vocab = model.config.audio_vocab_size
    hidden = jnp.ones((model.config.backbone.embed_dim,))
    codes = draw_frames(blank, hidden, dataclasses.replace(OFF, top_k=vocab))
    for left in range(codes.shape[1]):
        for right in range(left):
            pairs = np.bincount(codes[:, left] * vocab + codes[:, right], minlength=vocab**2)
            assert stats.chisquare(pairs).pvalue > ACCEPTED, (left, right)
