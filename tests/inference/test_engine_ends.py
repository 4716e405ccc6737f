"""How requests and engines end: finished, cancelled, refused, failed or closed."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engine_requests import ENDLESS, FRAME, REQUESTS, WAIT_S, first_chunk

from csm_jax import CSMError, Engine, InputError
from csm_jax.errors import QueueFullError, RequestCancelledError
from csm_jax.inference.decode_batch import DecodeBatch
from csm_jax.inference.engine_core import EngineCore
from csm_jax.inference.request_state import RequestState


def test_cancel_frees_the_slot_at_the_next_step(model, alone):
    with Engine(model, max_batch=1) as engine:
        running = engine.submit(ENDLESS)
        chunks = iter(running)
        assert len(next(chunks)) == FRAME
        waiting = engine.submit(REQUESTS["short"])
        running.cancel()
        np.testing.assert_array_equal(waiting.codes(), alone["short"][0])
        for end in (running.codes, running.result, lambda: list(chunks), lambda: list(running)):
            with pytest.raises(RequestCancelledError):
                end()


def test_a_cancelled_waiting_request_never_runs(model, alone, monkeypatch):
    joined, join = [], DecodeBatch.join

    def note(self, index, utterance):
        joined.append(utterance.seed)
        join(self, index, utterance)

    monkeypatch.setattr(DecodeBatch, "join", note)
    with Engine(model, max_batch=1) as engine:
        running = engine.submit(ENDLESS)
        first_chunk(running)
        waiting, last = engine.submit("No.", seed=77), engine.submit(REQUESTS["another seed"])
        waiting.cancel()
        with pytest.raises(RequestCancelledError):
            waiting.codes()  # while the first one is still running
        running.cancel()
        np.testing.assert_array_equal(last.codes(), alone["another seed"][0])
    assert joined == [ENDLESS.seed, 2]


def test_cancelling_a_finished_request_changes_nothing(model, alone):
    with Engine(model, max_batch=1) as engine:
        ticket = engine.submit(REQUESTS["short"])
        ticket.codes()
        ticket.cancel()
        np.testing.assert_array_equal(ticket.codes(), alone["short"][0])


# --- Refused -------------------------------------------------------------------------------------


def test_submit_to_a_full_queue_raises_or_waits(model, alone):
    with Engine(model, max_batch=1, max_queue=2) as engine, ThreadPoolExecutor(1) as pool:
        running = engine.submit(ENDLESS)
        first_chunk(running)
        engine.submit(REQUESTS["short"])
        engine.submit(REQUESTS["short"])
        with pytest.raises(QueueFullError, match="2 requests are waiting"):
            engine.submit("No.")
        patient = pool.submit(engine.submit, REQUESTS["greedy"], wait=True)
        time.sleep(0.2)
        assert not patient.done()
        running.cancel()
        codes = patient.result(WAIT_S).codes()
    np.testing.assert_array_equal(codes, alone["greedy"][0])


def test_submit_refuses_a_bad_request(model):
    with Engine(model, max_batch=1) as engine:
        with pytest.raises(InputError, match="the text is empty"):
            engine.submit(" ")
        with pytest.raises(InputError, match="no room for its speech"):
            Engine.submit(_small(engine), "a " * 10)


def _small(engine: Engine) -> Engine:
    engine.max_seq_len = 8
    return engine


@pytest.mark.parametrize("sizes", [{"max_batch": 0}, {"max_queue": 0}])
def test_sizes_below_one_are_refused(model, sizes):
    with pytest.raises(InputError, match="must be at least 1"):
        Engine(model, **sizes)


# --- Failed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_failing_request_does_not_affect_others(model, alone, monkeypatch, stream):
    accept = RequestState.accept

    def fail(self, codes, attention=None):
        if self._request.seed == 66 and self._total >= 3:
            raise InputError("this one is bad")
        return accept(self, codes, attention)

    monkeypatch.setattr(RequestState, "accept", fail)
    with Engine(model, max_batch=3) as engine:
        names = ["parts", "greedy", "short", "speaker"]
        before = [engine.submit(REQUESTS[name], stream=stream) for name in names[:2]]
        # Two parts, so that there is a step after frame 3 however long the chunks are.
        bad = engine.submit("One thing. Or another.", seed=66, stream=stream)
        after = [engine.submit(REQUESTS[name], stream=stream) for name in names[2:]]
        with pytest.raises(InputError, match="this one is bad"):
            list(bad)
        for name, ticket in zip(names, before + after, strict=True):
            np.testing.assert_array_equal(ticket.codes(), alone[name][0], name)


def test_an_error_of_the_batch_fails_running_requests_only(model, alone, monkeypatch):
    run, is_broken = DecodeBatch.run, threading.Event()

    def break_once(self, *arguments, **named):
        if is_broken.is_set():
            is_broken.clear()
            raise RuntimeError("out of memory\nand so on")
        return run(self, *arguments, **named)

    monkeypatch.setattr(DecodeBatch, "run", break_once)
    with Engine(model, max_batch=1) as engine:
        running = engine.submit(ENDLESS)
        first_chunk(running)
        waiting = engine.submit(REQUESTS["short"])
        is_broken.set()
        with pytest.raises(CSMError, match=r"the engine failed: .*out of memory") as caught:
            running.result()
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert "\n" not in str(caught.value)
        np.testing.assert_array_equal(waiting.codes(), alone["short"][0])
        later = engine.submit(REQUESTS["another seed"])
        np.testing.assert_array_equal(later.codes(), alone["another seed"][0])
        np.testing.assert_allclose(later.result(), model.decode(later.codes()), atol=1e-5)


def test_an_error_of_the_batch_fails_requests_in_the_prefill_queue(model, alone, monkeypatch):
    run, gate, is_broken = DecodeBatch.run, threading.Event(), threading.Event()

    def break_with_one_in_the_queue(batch, *arguments, **named):
        assert gate.wait(WAIT_S)
        if sum(row is not None for row in batch._slots) == 2 and not is_broken.is_set():
            is_broken.set()
            raise RuntimeError("out of memory")
        return run(batch, *arguments, **named)

    monkeypatch.setattr(DecodeBatch, "run", break_with_one_in_the_queue)
    with Engine(model, max_batch=3) as engine:
        tickets = [engine.submit(ENDLESS) for _ in range(3)]
        gate.set()
        for ticket in tickets:
            with pytest.raises(CSMError, match="the engine failed"):
                ticket.codes()
        later = engine.submit(REQUESTS["short"])
        np.testing.assert_array_equal(later.codes(), alone["short"][0])


def test_tickets_of_a_dead_engine_raise(model, monkeypatch):
    def fail(self, *_, **__):
        raise RuntimeError("no memory")

    with Engine(model, max_batch=1) as engine:
        tickets = [engine.submit(ENDLESS), engine.submit("No.")]
        first_chunk(tickets[0])
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(EngineCore, "reset", fail)
        monkeypatch.setattr(DecodeBatch, "run", fail)
        for ticket in tickets:
            with pytest.raises(CSMError, match="the engine"):
                ticket.codes()
        with pytest.raises(CSMError, match="the engine is closed"):
            engine.submit("No.")


# --- Closed --------------------------------------------------------------------------------------


def test_close_cancels_all_requests(model):
    engine = Engine(model, max_batch=1, max_queue=1)
    running = engine.submit(ENDLESS)
    first_chunk(running)
    waiting = engine.submit("No.")
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(engine.submit, "No.", wait=True)
        time.sleep(0.1)
        engine.close()
        with pytest.raises(CSMError, match="the engine is closed"):
            patient.result(WAIT_S)
    for ticket in (running, waiting):
        with pytest.raises(RequestCancelledError):
            ticket.result()
    with pytest.raises(CSMError, match="the engine is closed"):
        engine.submit("No.")
    engine.close()


def test_leaving_the_block_finishes_requests_unless_by_an_error(model, alone):
    names = ["short", "greedy", "speaker"]
    with Engine(model, max_batch=1) as engine:
        tickets = [engine.submit(REQUESTS[name]) for name in names]
    for name, ticket in zip(names, tickets, strict=True):
        np.testing.assert_array_equal(ticket.codes(), alone[name][0])
    tickets.clear()

    def stumble():
        with Engine(model, max_batch=1) as engine:
            tickets.append(engine.submit(ENDLESS))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stumble()
    with pytest.raises(RequestCancelledError):
        tickets[0].codes()


def test_close_keeps_its_time_limit(model, alone):
    engine = Engine(model, max_batch=2)
    endless, short = engine.submit(ENDLESS), engine.submit(REQUESTS["one frame"])
    short.codes()
    started = time.monotonic()
    engine.close(finish=True, seconds=0.5)
    assert time.monotonic() - started < 10
    np.testing.assert_array_equal(short.codes(), alone["one frame"][0])
    with pytest.raises(RequestCancelledError):
        endless.codes()


def test_a_process_can_exit_while_an_engine_runs(own_cache):
    """It ends without `close` and during a computation, which could crash Python."""
    program = """
import csm_jax
engine = csm_jax.Engine(csm_jax.load("random:tiny"), max_batch=1)
ticket = engine.submit("Hi.", max_audio_length_ms=70_000, guard="off")
print(len(next(iter(ticket))))
"""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(own_cache / "xla")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{FRAME}\n", "")
