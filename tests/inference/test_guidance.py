"""Classifier-free guidance: what a scale of 0 and of 1 is, alone, in streams and in the engine."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from csm_jax import (
    Engine,
    Guidance,
    InputError,
    Interventions,
    LogitsFunction,
    Request,
    Sampling,
    Segment,
)

NUM_FRAMES = 12
TEXT = "so it is"


@pytest.fixture(scope="module")
def context(model):
    codes = np.random.default_rng(1).integers(1, 30, (5, model.config.num_codebooks))
    return [Segment(1, "before", codes=codes.astype(np.int32))]


@pytest.fixture(scope="module")
def plain(context):
    return Request(TEXT, 0, context, max_audio_length_ms=80 * NUM_FRAMES, seed=3, guard="off")


def guided(request: Request, scale, over="text") -> Request:
    # An array in any case, for which one program is compiled.
    changes = Interventions(guidance=Guidance(np.resize(scale, 4), over))
    return dataclasses.replace(request, interventions=changes)


def test_a_scale_of_0_over_the_context_is_speech_without_it(model, plain):
    codes = model.generate_codes(guided(plain, 0.0, "context"))
    np.testing.assert_array_equal(codes, model.generate_codes(plain, context=[]))
    assert (codes != model.generate_codes(plain)).any()


def test_a_scale_of_1_changes_nothing(model, plain):
    codes = model.generate_codes(guided(plain, 1.0))
    np.testing.assert_array_equal(codes, model.generate_codes(plain))


def test_a_scale_of_0_over_the_text_does_not_depend_on_it(model, plain):
    first = guided(plain, 0.0)
    codes = model.generate_codes(first)
    other = dataclasses.replace(first, text="the other")
    np.testing.assert_array_equal(codes, model.generate_codes(other))
    assert (codes != model.generate_codes(plain)).any()


def test_a_scale_by_frame_holds_from_its_frame_on(model, plain):
    codes = model.generate_codes(guided(plain, [1.0, 1.0, 1.0, -1.0]))
    expected = model.generate_codes(plain)
    np.testing.assert_array_equal(codes[:3], expected[:3])
    assert (codes[3:] != expected[3:]).any()


def used_before(logits, seen, step):
    """The repetition penalty as a function of logits."""
    seen = seen | (jnp.arange(len(logits), dtype=jnp.int32) == step.previous[0])
    penalized = jnp.where(logits > 0, logits / 1.5, logits * 1.5)
    return jnp.where(seen, penalized, logits), seen


def test_an_engine_changes_each_request_apart(model, plain):
    """And its batch has its own number of rows again when the guided requests have left."""
    seen = np.zeros(model.config.audio_vocab_size, bool)
    penalize = Interventions(logits=LogitsFunction(used_before, seen))
    wanted = [
        guided(plain, 2.0),
        plain,
        dataclasses.replace(plain, interventions=penalize),
    ]
    expected = [model.generate_codes(request) for request in wanted[:2]]
    expected.append(model.generate_codes(plain, sampling=Sampling(repetition_penalty=1.5)))
    with Engine(model, max_batch=3) as engine:
        with engine._changed:  # so that all start at once
            tickets = [engine.submit(request, stream=False) for request in wanted]
        for ticket, codes in zip(tickets, expected, strict=True):
            np.testing.assert_array_equal(ticket.codes(), codes)
        assert len(engine._core.batch._state.frame) == 3


@pytest.mark.long
def test_streams_are_guided(model, plain):
    request = guided(plain, 2.0)
    streamed = np.concatenate(list(model.stream(request)))
    np.testing.assert_allclose(streamed, model.generate(request), atol=1e-4)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (2.0, "guidance is of type float"),
        (Guidance(1.0, "speaker"), "guidance is over speaker, expected text or context"),
        (Guidance(np.nan), "scale of guidance must be finite"),
        (Guidance(np.ones((2, 2))), r"scale of guidance has shape \[2, 2\]"),
        (Guidance("much"), "scale of guidance is 'much'"),
    ],
    ids=str,
)
def test_guidance_that_does_not_fit_is_refused(model, guidance, message):
    with pytest.raises(InputError, match=message):
        model.generate_codes(TEXT, interventions=Interventions(guidance=guidance))


@pytest.mark.long
def test_guidance_over_the_text_has_fewer_word_errors_than_speech_without_it(capsys):
    guidance_errors = pytest.importorskip("guidance_errors")
    rates = guidance_errors.main(["--scales=0,1.5", "--count=4", "--batch=4"])
    assert rates[1.5] < 0.5 < rates[0]
