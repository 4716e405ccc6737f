"""States and attention of both stacks against those of transformers."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch import nn

import csm_jax
import oracles
from csm_jax import InputError, Segment
from csm_jax.inference.given_speech import read_speech

CONFIG = csm_jax.tiny()
CODES = np.random.default_rng(4).integers(0, 30, (2, 11, CONFIG.num_codebooks)).astype(np.int32)
CONTEXT = [Segment(1, "before", codes=CODES[0])]
# In any order, and not all of them.
LAYERS = {"backbone": (CONFIG.backbone.num_layers, 0, 1), "depth_decoder": (1, 0)}
ATTENTION = {"backbone": (CONFIG.backbone.num_layers - 1, 0), "depth_decoder": (0,)}


@pytest.fixture(scope="module")
def reference():
    model = oracles.hf_model(CONFIG, seed=3)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def states(model):
    return model.states(
        "said",
        CODES[1],
        2,
        CONTEXT,
        backbone=LAYERS["backbone"],
        backbone_attention=ATTENTION["backbone"],
        depth_decoder=LAYERS["depth_decoder"],
        depth_decoder_attention=ATTENTION["depth_decoder"],
    )


@pytest.fixture(scope="module")
def speech(model):
    return read_speech(model, [*CONTEXT, Segment(2, "said", codes=CODES[1])])


def close(got, expected: list[torch.Tensor]):
    np.testing.assert_allclose(got, torch.stack(expected).numpy(), atol=1e-4)


@torch.no_grad()
def test_the_backbone_equals_transformers(reference, states, speech):
    theirs = reference.backbone_model(
        inputs_embeds=oracles.hf_embed(reference, speech.prompt)[None],
        output_hidden_states=True,
        output_attentions=True,
    )
    close(states.backbone, [theirs.hidden_states[layer][0] for layer in LAYERS["backbone"]])
    attention = [theirs.attentions[layer][0] for layer in ATTENTION["backbone"]]
    close(states.backbone_attention, attention)
    assert states.backbone.axes == ("layer", "position", "channel")
    assert states.backbone_attention.axes == ("layer", "head", "position", "attended")


@torch.no_grad()
def test_the_depth_decoder_equals_transformers(reference, states, speech):
    """Its first state is projected from the backbone's; transformers projects all of them."""
    hidden = oracles.hf_hidden(reference, speech.prompt)[speech.start - 1 : -2]
    inputs = nn.functional.pad(torch.as_tensor(CODES[1][:, :-1]).long(), (1, 0))
    theirs = reference.depth_decoder.model(
        input_ids=inputs,
        backbone_last_hidden_state=hidden,
        output_hidden_states=True,
        output_attentions=True,
    )
    close(states.depth_decoder, [theirs.hidden_states[i] for i in LAYERS["depth_decoder"]])
    attention = [theirs.attentions[layer] for layer in ATTENTION["depth_decoder"]]
    close(states.depth_decoder_attention, attention)
    assert states.depth_decoder.axes == ("layer", "frame", "codebook", "channel")
    names = ("layer", "frame", "head", "codebook", "attended")
    assert states.depth_decoder_attention.axes == names


def test_positions_are_those_of_the_prompt(states, speech):
    assert speech.prompt.mask[states.start - states.num_text : states.start, -1].all()
    np.testing.assert_array_equal(speech.prompt.frames[states.start : -1, :-1], CODES[1])
    assert len(states.backbone.values[0]) == states.start + len(CODES[1]) + 1


def test_without_layers_there_are_empty_arrays(model):
    empty = model.states("said", CODES[1])
    for array in (empty.backbone, empty.backbone_attention, empty.depth_decoder):
        assert (len(array.values), array.values.ndim) == (0, len(array.axes))


def test_layers_that_the_model_does_not_have_are_refused(model):
    last = CONFIG.backbone.num_layers
    with pytest.raises(InputError, match=f"backbone is .* have layers 0 to {last}"):
        model.states("said", CODES[1], backbone=[last + 1])
    with pytest.raises(InputError, match=f"backbone_attention is .* 0 to {last - 1}"):
        model.states("said", CODES[1], backbone_attention=[last])
    with pytest.raises(InputError, match="depth_decoder is"):
        model.states("said", CODES[1], depth_decoder=[-1])
