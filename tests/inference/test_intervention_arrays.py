"""Interventions of a request as arrays of its utterances, and those that are refused."""

import dataclasses

import numpy as np
import pytest
from engine_requests import SMALL

import csm_jax
from csm_jax import Guidance, HeadOutput, InputError, Interventions, Request, Steering
from csm_jax.inference.intervention_arrays import by_frame, from_frame
from csm_jax.inference.request_state import RequestState

CONFIG = csm_jax.tiny()
UPPER, LOWER = CONFIG.backbone, CONFIG.depth_decoder
RAMP = np.arange(20, dtype=np.float32)


@pytest.fixture(scope="module")
def model():
    """Deeper than that of the other tests of inference."""
    return dataclasses.replace(csm_jax.load("random:tiny"), inference=SMALL)


def test_the_last_number_goes_on():
    np.testing.assert_array_equal(from_frame(by_frame(3, "n"), 7), [3])
    np.testing.assert_array_equal(from_frame(by_frame([1, 2, 3], "n"), 1), [2, 3])
    np.testing.assert_array_equal(from_frame(by_frame([1, 2, 3], "n"), 9), [3])


def test_frames_are_counted_through_the_parts_of_a_text(model):
    steering = [Steering(1, np.ones(UPPER.embed_dim), RAMP), Steering(2, np.ones(UPPER.embed_dim))]
    changes = Interventions(steering=steering, guidance=Guidance(RAMP))
    state = RequestState(
        model, Request("One thing. " * 60, guard="off", interventions=changes), lambda notice: None
    )
    first = state.next_utterance()
    codes = np.ones((6, CONFIG.num_codebooks), np.int32)
    codes[5] = 0
    state.accept(codes)
    second = state.next_utterance()
    for utterance, done in ((first, 0), (second, 5)):
        assert utterance is not None
        assert utterance.guidance is not None
        np.testing.assert_array_equal(utterance.guidance.scale, RAMP[done:])
        layers = utterance.backbone.steering
        np.testing.assert_array_equal(layers[1].strengths[:, 0], RAMP[done:])
        np.testing.assert_array_equal(layers[2].strengths, [[1]])


def test_vectors_of_one_strength_become_one(model):
    """So that their number needs no other program."""
    vectors = np.random.default_rng(0).normal(size=(3, LOWER.embed_dim)).astype(np.float32)
    steering = [Steering(2, vector, i, "depth_decoder") for i, vector in enumerate(vectors)]
    request = Request("so", guard="off", interventions=Interventions(steering=steering))
    utterance = RequestState(model, request).next_utterance()
    assert utterance is not None
    assert not utterance.backbone.steering
    (layer,) = utterance.depth_decoder.steering.values()
    np.testing.assert_allclose(layer.vectors, [vectors[1] + 2 * vectors[2]], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steering": [Steering(1, RAMP, 1.0, "codec")]}, "stack is codec, expected backbone or"),
        ({"steering": [Steering(1, np.ones(UPPER.embed_dim), [])]}, "strength of steering has"),
        (
            {"steering": [Steering(1, np.ones(LOWER.embed_dim - 1), 1, "depth_decoder")]},
            "vector of",
        ),
        ({"heads": [HeadOutput(UPPER.num_layers, 0)]}, "layer of a head is"),
        ({"heads": [HeadOutput(0, LOWER.num_heads, stack="depth_decoder")]}, "head is"),
        ({"heads": [HeadOutput(0, 0, RAMP[:3])]}, r"output of a head has shape \[3\]"),
        ({"heads": [HeadOutput(0, 0, np.full(UPPER.head_dim, np.nan))]}, "head must be finite"),
    ],
    ids=str,
)
def test_changes_that_do_not_fit_are_refused(model, changes, message):
    with pytest.raises(InputError, match=message):
        RequestState(model, Request("so", interventions=Interventions(**changes)))
