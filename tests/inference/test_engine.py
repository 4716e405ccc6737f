"""Continuous batching: the codes of a request do not depend on what else the batch runs."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engine_requests import ENDLESS, FRAME, REQUESTS, first_chunk
from fixtures import CONFIG

from csm_jax import Engine, Request
from csm_jax.inference import engine_core, request_state
from csm_jax.inference.guard import Action, Verdict
from csm_jax.inference.pacing import Pace


@pytest.mark.parametrize("seed", [0, 1])
def test_codes_do_not_depend_on_other_requests(model, alone, seed):
    """More requests than slots, in any order, some of them late, with and without a stream."""
    rng = np.random.default_rng(seed)
    names = list(rng.permutation(list(REQUESTS)))
    with Engine(model, max_batch=3) as engine:
        tickets = {}
        for name in names:
            tickets[name] = engine.submit(REQUESTS[name], stream=bool(rng.integers(2)))
            if rng.random() < 0.3:
                first_chunk(tickets[rng.choice(list(tickets))])
        for name, ticket in tickets.items():
            codes, notices = alone[name]
            np.testing.assert_array_equal(ticket.codes(), codes, name)
            assert ticket.codes().dtype == np.int32
            assert ticket.notices == notices, name
            assert ticket.request.text == REQUESTS[name].text


@pytest.mark.parametrize("name", ["another seed", "parts"])
def test_codes_are_the_same_in_an_empty_and_a_full_engine(model, name):
    with Engine(model, max_batch=3) as engine:
        by_itself = engine.submit(REQUESTS[name]).codes()
        others = [engine.submit(ENDLESS) for _ in range(2)]
        for other in others:
            first_chunk(other)
        in_company = engine.submit(REQUESTS[name]).codes()
        for other in others:
            other.cancel()
    np.testing.assert_array_equal(by_itself, in_company)


@pytest.mark.parametrize("name", ["another seed", "parts"])
def test_samples_of_streams_are_equal_to_the_bit_at_any_pace(model, name, monkeypatch):
    """The clock decides how many frames are generated at a time, here by chance."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(Pace, "next_chunk", lambda _: int(rng.integers(1, 9)))
    expected = np.concatenate(list(model.stream(REQUESTS[name])))
    for _ in range(4):
        np.testing.assert_array_equal(
            np.concatenate(list(model.stream(REQUESTS[name]))), expected, strict=True
        )
    with Engine(model, max_batch=3) as engine:
        by_itself = np.concatenate(list(engine.submit(REQUESTS[name])))
        for _ in range(4):
            others = [engine.submit(ENDLESS) for _ in range(2)]
            in_company = np.concatenate(list(engine.submit(REQUESTS[name])))
            np.testing.assert_array_equal(in_company, by_itself, strict=True)
            for other in others:
                other.cancel()
    np.testing.assert_allclose(by_itself, expected, atol=1e-5)


def test_submit_works_from_many_threads(model, alone):
    names = ["short", "greedy", "speaker", "one frame"]
    with Engine(model, max_batch=3) as engine, ThreadPoolExecutor(4) as pool:
        spoken = list(pool.map(lambda name: engine.submit(REQUESTS[name]).codes(), names))
    for name, codes in zip(names, spoken, strict=True):
        np.testing.assert_array_equal(codes, alone[name][0])


def test_submit_takes_the_arguments_of_generate(model, alone):
    with Engine(model, max_batch=3) as engine:
        ticket = engine.submit("Well.", 3, seed=3, max_audio_length_ms=720)
        assert ticket.request == REQUESTS["speaker"]
        np.testing.assert_array_equal(ticket.codes(), alone["speaker"][0])


def test_generate_batch_equals_its_requests_alone(model, alone):
    notices = []
    spoken = model.generate_batch(
        list(REQUESTS.values()), max_batch=3, notify=lambda *notice: notices.append(notice)
    )
    for audio, (codes, _) in zip(spoken, alone.values(), strict=True):
        np.testing.assert_array_equal(audio, model.decode(codes))
    wanted = [(i, notice) for i, (_, known) in enumerate(alone.values()) for notice in known]
    assert notices == wanted
    assert model.generate_batch([]) == []


# --- Streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 3])
def test_chunks_of_a_ticket_equal_its_decoded_codes(model, alone, together, monkeypatch):
    """However many rows the codec decodes in one call."""
    monkeypatch.setattr(engine_core, "rows_together", lambda num_rows: together)
    names = ["short", "greedy", "parts", "recording"]
    with Engine(model, max_batch=3) as engine:
        tickets = [engine.submit(REQUESTS[name]) for name in names]
        for name, ticket in zip(names, tickets, strict=True):
            chunks = list(ticket)
            assert len(chunks[0]) == FRAME
            assert {chunk.dtype for chunk in chunks} == {np.dtype(np.float32)}
            whole = model.decode(alone[name][0])
            np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)
            again = list(ticket)
            assert [len(chunk) for chunk in again] == [len(chunk) for chunk in chunks]
            np.testing.assert_array_equal(np.concatenate(again), np.concatenate(chunks))
            np.testing.assert_array_equal(ticket.result(), np.concatenate(chunks))


def test_a_request_without_stream_is_one_chunk(model, alone):
    with Engine(model, max_batch=3) as engine:
        ticket = engine.submit(REQUESTS["speaker"], stream=False)
        (chunk,) = ticket
    np.testing.assert_array_equal(chunk, model.decode(alone["speaker"][0]))
    np.testing.assert_array_equal(ticket.result(), chunk)


def test_listeners_get_all_chunks_and_the_end(model, alone):
    received, late, failed = [], [], []

    def fails(chunk):
        failed.append(chunk)
        raise ZeroDivisionError

    with Engine(model, max_batch=1) as engine:
        ticket = engine.submit(REQUESTS["short"])
        ticket.add_listener(received.append)
        ticket.add_listener(fails)
        ticket.codes()
        ticket.add_listener(late.append)
    assert len(failed) == 1
    for chunks in (received, late):
        assert chunks.pop() is None
        whole = model.decode(alone["short"][0])
        np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)


def test_chunks_are_not_kept_with_keep_false(model, alone):
    received = []
    with Engine(model, max_batch=1) as engine:
        ticket = engine.submit(REQUESTS["short"], keep=False)
        ticket.codes()  # some chunks exist before the listener
        ticket.add_listener(received.append)
        assert received.pop() is None
        assert not ticket._chunks
        whole = model.decode(alone["short"][0])
        np.testing.assert_allclose(np.concatenate(received), whole, atol=1e-5)
        np.testing.assert_array_equal(ticket.result(), whole)


# --- Rewinding -----------------------------------------------------------------------------------


class Resampling:
    """A guard that resamples what follows frame 7, once."""

    def __init__(self, *_):
        self.num_frames, self.has_resampled = 0, False

    def accept(self, frames):
        if not self.has_resampled and self.num_frames + len(frames) > 7:
            self.has_resampled = True
            kept, self.num_frames = frames[: 7 - self.num_frames], 7
            return Verdict(kept, Action.RESAMPLE, "stutters", 7)
        self.num_frames += len(frames)
        return Verdict(frames, Action.CONTINUE, "", self.num_frames)

    def finish(self):
        return np.zeros((0, CONFIG.num_codebooks), np.int32)


def test_rewinding_in_a_batch_equals_rewinding_alone(model, monkeypatch):
    unguarded = model.generate_codes("Hi.", seed=11, max_audio_length_ms=1200, guard="off")
    monkeypatch.setattr(request_state, "Guard", Resampling)
    requests = [Request("Hi.", seed=seed, max_audio_length_ms=1200) for seed in (11, 12, 13, 14)]
    wanted = [model.generate_codes(request) for request in requests]
    assert len(wanted[0]) == 15
    np.testing.assert_array_equal(wanted[0][:7], unguarded[:7])
    assert (wanted[0][7:] != unguarded[7:]).any()
    with Engine(model, max_batch=3) as engine:
        tickets = [engine.submit(request) for request in requests]
        for ticket, codes in zip(tickets, wanted, strict=True):
            np.testing.assert_array_equal(ticket.codes(), codes)
            assert [notice.kind for notice in ticket.notices] == ["resampled", "cut"]
            np.testing.assert_allclose(ticket.result(), model.decode(codes), atol=1e-5)
