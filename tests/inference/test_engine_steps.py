"""The steps of an engine: how many frames each generates, prefills and decodes, and its timing."""

import itertools
import threading
import time

import numpy as np
import pytest
from engine_requests import ENDLESS, FRAME, REQUESTS, WAIT_S, first_chunk, with_inference

from csm_jax import Engine
from csm_jax.errors import RequestCancelledError
from csm_jax.inference.decode_batch import DecodeBatch
from csm_jax.inference.pacing import Pace


class Watched:
    """Records what a batch is asked for, "join" or a number of frames; runs wait for the gate."""

    def __init__(self, monkeypatch, seconds_per_frame=0.0):
        self.events, self.gate = [], threading.Event()
        join, run = DecodeBatch.join, DecodeBatch.run

        def note_join(batch, index, utterance):
            self.events.append("join")
            join(batch, index, utterance)

        def note_run(batch, num_frames, pause=False):
            assert self.gate.wait(WAIT_S)
            self.events.append(num_frames)
            time.sleep(seconds_per_frame * num_frames)
            return run(batch, num_frames, pause)

        monkeypatch.setattr(DecodeBatch, "join", note_join)
        monkeypatch.setattr(DecodeBatch, "run", note_run)


@pytest.mark.parametrize("stream", [True, False])
def test_a_running_stream_waits_for_one_prefill_at_most(model, monkeypatch, stream):
    watched = Watched(monkeypatch)
    with Engine(model, max_batch=3) as engine:
        tickets = [engine.submit(ENDLESS, stream=stream) for _ in range(3)]
        watched.gate.set()
        deadline = time.monotonic() + WAIT_S
        while watched.events.count("join") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for ticket in tickets:
            ticket.cancel()
    if stream:
        assert watched.events[:5] == ["join", 1, "join", 1, "join"]
    else:
        assert ("join", "join") in itertools.pairwise(watched.events)


def test_a_request_waits_one_frame_for_its_prefill(model, monkeypatch):
    """This holds also if the running streams have enough to play."""
    monkeypatch.setattr(Pace, "next_chunk", lambda self: 8)
    model = with_inference(model, max_step_seconds=1e9)
    watched = Watched(monkeypatch)
    with Engine(model, max_batch=3) as engine:
        tickets = [engine.submit(ENDLESS) for _ in range(3)]
        watched.gate.set()
        first_chunk(tickets[2])
        for ticket in tickets:
            ticket.cancel()
    assert watched.events[:6] == ["join", 1, "join", 1, "join", 8]


def test_blocks_grow_beside_a_hasty_stream(model, monkeypatch):
    """The codec takes little longer for eight frames than for one."""
    monkeypatch.setattr(Pace, "next_chunk", lambda self: 1)
    with Engine(model, max_batch=3) as engine:
        ticket, other = (engine.submit(REQUESTS[name]) for name in ("penalty", "short"))
        chunks = list(ticket)
        other.result()
    whole = model.decode(ticket.codes())
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)
    sizes = [len(chunk) // FRAME for chunk in chunks]
    while sizes[-1] < sizes[-2]:  # what is left at the end
        sizes.pop()
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert sizes[-1] > 1


def test_steps_have_few_frames_where_frames_are_slow(model, alone, monkeypatch):
    watched = Watched(monkeypatch, seconds_per_frame=0.1)
    watched.gate.set()
    with Engine(model, max_batch=3) as engine:
        ticket = engine.submit(REQUESTS["another seed"], stream=False)
        np.testing.assert_array_equal(ticket.codes(), alone["another seed"][0])
    assert max(watched.events[1:]) <= model.inference.max_step_seconds / 0.1


def test_timing_counts_every_second_once(model):
    with Engine(model, max_batch=1, max_seq_len=256) as engine:
        started = time.perf_counter()
        tickets = [engine.submit(REQUESTS["short"]) for _ in range(2)]
        first, second = (ticket.codes() is not None and ticket.timing for ticket in tickets)
        elapsed = time.perf_counter() - started
    # The second waits for the only slot, and nothing is counted twice.
    assert second.queue > first.queue
    spent = [each.prefill + each.frames + each.codec for each in (first, second)]
    assert min(first.prefill, first.frames, first.codec) > 0
    assert sum(spent) < elapsed


def test_a_warm_up_that_should_stop_raises(model):
    with (
        Engine(model, max_batch=1, max_seq_len=128) as engine,
        pytest.raises(RequestCancelledError),
    ):
        engine.warm_up(should_stop=lambda: True)
