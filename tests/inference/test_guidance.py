"""Classifier-free guidance: what a scale of 0 and of 1 is, in batches, streams and the engine."""

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
from csm_jax.inference.decode_loop import new_batch
from csm_jax.inference.request_state import RequestState

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
    changes = Interventions(guidance=Guidance(scale, over))
    return dataclasses.replace(request, interventions=changes)


@pytest.fixture(scope="module")
def requests(plain) -> dict[str, Request]:
    return {
        "guided": guided(plain, [2.0, 2.0]),
        "plain": plain,
        "without context": dataclasses.replace(plain, context=[]),
        "penalized": dataclasses.replace(plain, sampling=Sampling(repetition_penalty=1.5)),
        "0 over context": guided(plain, 0.0, "context"),
        "0 over text": guided(plain, 0.0),
        "0 over another text": dataclasses.replace(guided(plain, 0.0), text="the other"),
        "1": guided(plain, 1.0),
        "1 for three frames": guided(plain, [1.0, 1.0, 1.0, -1.0]),
    }


@pytest.fixture(scope="module")
def generated(model, requests) -> dict[str, np.ndarray]:
    """The codes of all requests, side by side in one batch, for which little is compiled."""
    batch = new_batch(model, len(requests), 128)
    for index, request in enumerate(requests.values()):
        utterance = RequestState(model, request).next_utterance()
        assert utterance is not None
        batch.join(index, utterance)
    codes = batch.run(NUM_FRAMES).codes
    assert codes.shape[1] == NUM_FRAMES
    return dict(zip(requests, codes, strict=True))


def test_a_scale_of_0_over_the_context_is_speech_without_it(generated):
    np.testing.assert_array_equal(generated["0 over context"], generated["without context"])
    assert (generated["0 over context"] != generated["plain"]).any()


def test_a_scale_of_0_over_the_text_does_not_depend_on_it(generated):
    np.testing.assert_array_equal(generated["0 over text"], generated["0 over another text"])
    assert (generated["0 over text"] != generated["plain"]).any()


def test_a_scale_of_1_changes_nothing(generated):
    np.testing.assert_array_equal(generated["1"], generated["plain"])


def test_a_scale_by_frame_holds_from_its_frame_on(generated):
    codes = generated["1 for three frames"]
    np.testing.assert_array_equal(codes[:3], generated["plain"][:3])
    assert (codes[3:] != generated["plain"][3:]).any()


def used_before(logits, seen, step):
    """The repetition penalty as a function of logits."""
    seen = seen | (jnp.arange(len(logits), dtype=jnp.int32) == step.previous[0])
    penalized = jnp.where(logits > 0, logits / 1.5, logits * 1.5)
    return jnp.where(seen, penalized, logits), seen


def test_an_engine_changes_each_request_apart(model, plain, requests, generated):
    """And its batch has its own number of rows again when the guided request has left."""
    seen = np.zeros(model.config.audio_vocab_size, bool)
    penalize = Interventions(logits=LogitsFunction(used_before, seen))
    wanted = {
        "guided": requests["guided"],
        "plain": plain,
        "penalized": dataclasses.replace(plain, interventions=penalize),
    }
    with Engine(model, max_batch=3) as engine:
        with engine._changed:  # so that all start at once
            tickets = {name: engine.submit(each, stream=False) for name, each in wanted.items()}
        for name, ticket in tickets.items():
            np.testing.assert_array_equal(ticket.codes(), generated[name])
        assert len(engine._core.batch._state.frame) == 3


@pytest.mark.long
def test_streams_and_requests_alone_are_guided(model, requests, generated):
    codes = model.generate_codes(requests["guided"])
    np.testing.assert_array_equal(codes, generated["guided"])
    streamed = np.concatenate(list(model.stream(requests["guided"])))
    np.testing.assert_allclose(streamed, model.decode(codes), atol=1e-4)


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
