"""The facade on a model of random weights: what is streamed, generated and decoded is one thing."""

import dataclasses
import functools

import numpy as np
import pytest
from fixtures import CONFIG

import csm_jax
from csm_jax import InputError, Request, Sampling, Segment, generator, request_state
from csm_jax.guard import Guard, GuardLimits
from csm_jax.text import split_text

GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def model():
    return csm_jax.load("random:tiny")


def sound(num_frames: int) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(num_frames * CONFIG.codec.frame_size)
    return (0.1 * noise).astype(np.float32)


@pytest.fixture
def short_parts(monkeypatch):
    """Texts are cut at 12 characters, and take no more than 1.2 s."""
    monkeypatch.setattr(
        request_state, "split_text", functools.partial(split_text, max_characters=12)
    )
    monkeypatch.setattr(request_state, "needed_seconds", lambda text: 1.2)


@pytest.fixture
def strict_guard(monkeypatch):
    """A guard that random codes set off now and then: a fifth of them are silent here."""
    limits = GuardLimits(silent_frames=2, first_silent_frames=2, silence_before_holding=1)
    monkeypatch.setattr(request_state, "Guard", functools.partial(Guard, limits=limits))


REQUESTS = {
    "short": Request("Hi.", seed=1, max_audio_length_ms=2560, guard="off"),
    "context": Request("Hi.", 1, [Segment(0, "Yes?", sound(6))], seed=2, max_audio_length_ms=2560),
    "parts": Request("One thing. Or another. No more.", seed=3),
    "greedy": Request("Hi.", sampling=GREEDY, max_audio_length_ms=2560),
}


def told(speak, request: Request):
    notices = []
    return speak(request, notify=notices.append), notices


def streamed(model, request: Request) -> tuple[list[np.ndarray], list]:
    notices = []
    return list(model.stream(request, notify=notices.append)), notices


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("pace", [None, 1, 8])
def test_a_stream_is_what_is_generated(model, name, pace, monkeypatch):
    """With the same notices, whatever the pace."""
    if pace is not None:
        monkeypatch.setattr(generator.Pace, "next_chunk", lambda self: pace)
    whole, notices = told(model.generate, REQUESTS[name])
    chunks, same_notices = streamed(model, REQUESTS[name])
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)
    assert notices == same_notices
    assert {chunk.dtype for chunk in chunks} == {np.dtype(np.float32)}
    if pace is None:
        assert len(chunks[0]) == CONFIG.codec.frame_size


@pytest.mark.usefixtures("strict_guard")
@pytest.mark.parametrize("seed", range(4))
def test_a_stream_with_the_guard_at_work_is_what_is_generated(model, seed):
    request = Request("Hi.", seed=seed)
    whole, notices = told(model.generate, request)
    chunks, same_notices = streamed(model, request)
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)
    assert notices == same_notices
    assert "resampled" in [notice.kind for notice in notices]
    assert len(chunks[0]) == CONFIG.codec.frame_size


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("name", REQUESTS)
def test_generate_decodes_what_generate_codes_says(model, name):
    said, notices = told(model.generate_codes, REQUESTS[name])
    assert said.dtype == np.int32
    assert said.shape[1] == CONFIG.num_codebooks
    if name == "parts":  # of which each is 1.2 s of babble: no text would take longer
        assert [notice.kind for notice in notices] == ["guard_cut"] * 3
        assert len(said) == 3 * 15
    np.testing.assert_array_equal(told(model.generate, REQUESTS[name])[0], model.decode(said))
    counts = []
    again = model.generate_codes(REQUESTS[name], progress=counts.append, notify=lambda _: None)
    np.testing.assert_array_equal(again, said)
    assert counts == sorted(counts)
    assert counts[-1] == len(said)


def test_the_seed_decides(model):
    def say(seed: int, **changed) -> np.ndarray:
        request = dataclasses.replace(REQUESTS["short"], seed=seed, **changed)
        return told(model.generate_codes, request)[0]

    np.testing.assert_array_equal(say(1), say(1))
    assert (say(1) != say(2)).mean() > 0.5
    np.testing.assert_array_equal(say(1, sampling=GREEDY), say(2, sampling=GREEDY))
    assert len(say(-1)) == len(say(2**40)) == 32


def test_a_stream_refuses_before_it_starts(model):
    """Not when its first chunk is asked for."""
    with pytest.raises(InputError, match="the text is empty"):
        model.stream(" ")
