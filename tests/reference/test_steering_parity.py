"""Steered speech against transformers, with a hook that adds the vector to a layer's output."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import csm_jax
import oracles
from csm_jax import (
    Engine,
    InputError,
    Interventions,
    Request,
    Sampling,
    Segment,
    Steering,
)
from csm_jax.inference.given_speech import read_speech

CONFIG = csm_jax.tiny()
NUM_LAYERS, DIM = CONFIG.backbone.num_layers, CONFIG.backbone.embed_dim
VECTOR = np.random.default_rng(2).normal(size=DIM).astype(np.float32)
CODES = np.random.default_rng(4).integers(1, 30, (9, CONFIG.num_codebooks)).astype(np.int32)
CONTEXT = [Segment(1, "before", codes=CODES)]
NUM_FRAMES = 10


def request_for(*steering: Steering, **fields) -> Request:
    changes = Interventions(steering=steering)
    values = {"sampling": Sampling(greedy=True), "max_audio_length_ms": 80 * NUM_FRAMES} | fields
    return Request("said", 2, CONTEXT, interventions=changes, **values)


def behind(reference, model, codes, steering: Steering | None) -> float:
    """How far the least likely of generated codes is behind the likeliest id, in logits."""
    speech = read_speech(model, [*CONTEXT, Segment(2, "said", codes=codes)])

    def add(module, inputs, output):
        output = output.clone()
        output[:, speech.start - 1 :] += steering.strength * torch.as_tensor(steering.vector)
        return output

    hooks = []
    if steering is not None:
        layer = reference.backbone_model.layers[steering.layer - 1]
        hooks.append(layer.register_forward_hook(add))
    try:
        hidden = oracles.hf_hidden(reference, speech.prompt)[speech.start - 1 : -2]
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        first = reference.lm_head(hidden)[:, None]
    logits = torch.cat([first, oracles.hf_depth_logits(reference, hidden, codes)], dim=1)
    chosen = logits.gather(-1, torch.as_tensor(codes).long()[..., None])[..., 0]
    return float((logits.amax(-1) - chosen).max())


@pytest.mark.parametrize("layer", [1, NUM_LAYERS])
def test_steered_codes_are_the_likeliest_of_transformers(reference, model, layer):
    steering = Steering(layer, VECTOR, 1.5)
    codes = model.generate_codes(request_for(steering))
    assert len(codes) == NUM_FRAMES
    assert behind(reference, model, codes, steering) < 1e-3
    assert behind(reference, model, codes, None) > 0.1


def test_a_strength_of_0_changes_nothing(model):
    fields = {"sampling": Sampling(), "seed": 5}
    plain = model.generate_codes(request_for(**fields))
    steered = model.generate_codes(request_for(Steering(2, VECTOR, 0.0), **fields))
    np.testing.assert_array_equal(steered, plain)


def test_vectors_of_one_layer_add_up(model):
    half = Steering(1, VECTOR, 0.75)
    once = model.generate_codes(request_for(Steering(1, VECTOR, 1.5)))
    np.testing.assert_array_equal(model.generate_codes(request_for(half, half)), once)


def test_requests_of_a_batch_are_steered_apart(model):
    requests = [
        request_for(),
        request_for(Steering(1, VECTOR)),
        request_for(Steering(1, VECTOR, -2.0), Steering(NUM_LAYERS, VECTOR)),
    ]
    alone = [model.generate_codes(request) for request in requests]
    with Engine(model, max_batch=3) as engine:
        tickets = [engine.submit(request) for request in requests]
        for ticket, codes in zip(tickets, alone, strict=True):
            np.testing.assert_array_equal(ticket.codes(), codes)
    assert (alone[0] != alone[1]).any()
    assert (alone[0] != alone[2]).any()


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        (Steering(0, VECTOR), f"must be from 1 to {NUM_LAYERS}"),
        (Steering(NUM_LAYERS + 1, VECTOR), f"must be from 1 to {NUM_LAYERS}"),
        (Steering(1, VECTOR[:-1]), f"expected \\[{DIM}\\]"),
        (Steering(1, VECTOR * np.nan), "must be finite"),
    ],
)
def test_steering_that_does_not_fit_is_refused(model, steering, message):
    with pytest.raises(InputError, match=message):
        model.generate_codes(request_for(steering))
