"""The facade on random weights: what is streamed, generated and decoded is the same."""

import dataclasses

import numpy as np
import pytest
from engine_requests import with_inference
from fixtures import CONFIG

import csm_jax
from csm_jax import InputError, Request, Sampling, Segment
from csm_jax.inference.guard import GuardLimits
from csm_jax.inference.pacing import Pace

GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def model():
    return csm_jax.load("random:tiny")


def sound(num_frames: int) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(num_frames * CONFIG.codec.frame_size)
    return (0.1 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def short_parts(model):
    """The model, for which texts are split at 12 characters and take no more than 1.2 s."""
    return with_inference(model, max_part_characters=12, pause_seconds=1.2, seconds_per_letter=0.0)


@pytest.fixture(scope="module")
def strict_guard(model):
    """The model with a guard that random codes set off often: a fifth of them are silent."""
    limits = GuardLimits(silent_frames=2, first_silent_frames=2, silence_before_holding=1)
    return with_inference(model, guard=limits)


REQUESTS = {
    "short": Request("Hi.", seed=1, max_audio_length_ms=2560, guard="off"),
    "context": Request("Hi.", 1, [Segment(0, "Yes?", sound(6))], seed=2, max_audio_length_ms=2560),
    "parts": Request("One thing. Or another. No more.", seed=3),
    "greedy": Request("Hi.", sampling=GREEDY, max_audio_length_ms=2560),
}


def with_notices(speak, request: Request):
    notices = []
    return speak(request, notify=notices.append), notices


def streamed(model, request: Request) -> tuple[list[np.ndarray], list]:
    notices = []
    return list(model.stream(request, notify=notices.append)), notices


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("pace", [None, 1, 8])
def test_a_stream_equals_generated_audio(short_parts, name, pace, monkeypatch):
    """The notices are equal too, with every pace."""
    if pace is not None:
        monkeypatch.setattr(Pace, "next_chunk", lambda self: pace)
    whole, notices = with_notices(short_parts.generate, REQUESTS[name])
    chunks, same_notices = streamed(short_parts, REQUESTS[name])
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)
    assert notices == same_notices
    assert {chunk.dtype for chunk in chunks} == {np.dtype(np.float32)}
    if pace is None:
        assert len(chunks[0]) == CONFIG.codec.frame_size


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_that_the_guard_resamples_is_what_is_generated(strict_guard, seed):
    request = Request("Hi.", seed=seed)
    whole, notices = with_notices(strict_guard.generate, request)
    chunks, same_notices = streamed(strict_guard, request)
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)
    assert notices == same_notices
    assert "resampled" in [notice.kind for notice in notices]
    assert len(chunks[0]) == CONFIG.codec.frame_size


@pytest.mark.parametrize("name", REQUESTS)
def test_generate_decodes_the_codes_of_generate_codes(short_parts, name):
    model = short_parts
    codes, notices = with_notices(model.generate_codes, REQUESTS[name])
    assert codes.dtype == np.int32
    assert codes.shape[1] == CONFIG.num_codebooks
    if name == "parts":  # each is cut after 1.2 s, the longest that a text takes here
        assert [notice.kind for notice in notices] == ["guard_cut"] * 3
        assert len(codes) == 3 * 15
    audio, _ = with_notices(model.generate, REQUESTS[name])
    np.testing.assert_array_equal(audio, model.decode(codes))
    counts = []
    again = model.generate_codes(REQUESTS[name], progress=counts.append, notify=lambda _: None)
    np.testing.assert_array_equal(again, codes)
    assert counts == sorted(counts)
    assert counts[-1] == len(codes)


def test_equal_seeds_give_equal_codes_and_others_do_not(model):
    def generate(seed: int, **changed) -> np.ndarray:
        request = dataclasses.replace(REQUESTS["short"], seed=seed, **changed)
        return with_notices(model.generate_codes, request)[0]

    np.testing.assert_array_equal(generate(1), generate(1))
    assert (generate(1) != generate(2)).mean() > 0.5
    np.testing.assert_array_equal(generate(1, sampling=GREEDY), generate(2, sampling=GREEDY))
    assert len(generate(-1)) == len(generate(2**40)) == 32


def test_stream_refuses_bad_input_at_the_call(model):
    """The error does not wait for the first chunk."""
    with pytest.raises(InputError, match="the text is empty"):
        model.stream(" ")
