"""Continuous batching: a request says the same whoever shares the batch, and ends on its own."""

import functools
import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fixtures import CONFIG

import csm_jax
from csm_jax import (
    CSMError,
    Engine,
    InputError,
    Request,
    Sampling,
    Segment,
    active_request,
    decode_batch,
    generator,
    request_state,
)
from csm_jax import engine as engine_module
from csm_jax.decode_batch import DecodeBatch, bucket
from csm_jax.errors import QueueFullError, RequestCancelledError
from csm_jax.guard import Action, Verdict
from csm_jax.request_state import RequestState
from csm_jax.text import split_text

FRAME = CONFIG.codec.frame_size
GREEDY = Sampling(greedy=True)
# Long enough to be there until somebody ends it.
ENDLESS = Request("Hi.", seed=9, max_audio_length_ms=70_000, guard="off")
WAIT_S = 60


@pytest.fixture(scope="module", autouse=True)
def small():
    """Texts are cut at 12 characters and take no more than 2 s, and few shapes are compiled."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (decode_batch, generator):
            patch.setattr(module, "bucket", lambda length: max(128, bucket(length)))
        patch.setattr(request_state, "split_text", functools.partial(split_text, max_characters=12))
        patch.setattr(request_state, "needed_seconds", lambda text: 2.0)
        yield


@pytest.fixture(autouse=True)
def no_thread_is_left():
    # Other files of the same worker may have an engine that lives longer.
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert "csm_jax.Engine" not in left


@pytest.fixture(scope="module")
def model():
    return csm_jax.load("random:tiny")


def sound(num_frames: int) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(num_frames * FRAME)
    return (0.1 * noise).astype(np.float32)


CODES = np.random.default_rng(1).integers(1, 32, (5, CONFIG.num_codebooks)).astype(np.int32)
REQUESTS = {
    "one frame": Request("Hi.", seed=1, max_audio_length_ms=80),
    "short": Request("Hi.", seed=1, max_audio_length_ms=400),
    "another seed": Request("Hi.", seed=2, max_audio_length_ms=960),
    "speaker": Request("Well.", 3, seed=3, max_audio_length_ms=720),
    "greedy": Request("Hi.", sampling=GREEDY, max_audio_length_ms=800),
    "cool": Request("No.", sampling=Sampling(0.5, 5, 0.8, 0.01), max_audio_length_ms=640),
    "penalty": Request(
        "No.", sampling=Sampling(repetition_penalty=1.5, depth_top_k=3), max_audio_length_ms=1600
    ),
    "parts": Request("One thing. Or another. No more.", seed=4),
    "cut in part 2": Request("One thing. Or another. No more.", seed=5, max_audio_length_ms=2800),
    "recording": Request("Hi.", 1, [Segment(0, "Yes?", sound(6))], seed=6, max_audio_length_ms=400),
    "codes": Request("Hi.", 1, [Segment(1, "Yes?", codes=CODES)], seed=7, max_audio_length_ms=480),
}


@pytest.fixture(scope="module")
def alone(model):
    """Codes and notices of each request without an engine."""
    told = {}
    for name, request in REQUESTS.items():
        notices = []
        told[name] = model.generate_codes(request, notify=notices.append), notices
    return told


def first_chunk(ticket) -> np.ndarray:
    return next(iter(ticket))


# --- What is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_nobody_hears_who_shares_the_batch(model, alone, seed):
    """More requests than rows, in any order, some of them late, listened to or not."""
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
def test_an_empty_engine_and_a_full_one_say_the_same(model, name):
    with Engine(model, max_batch=3) as engine:
        by_itself = engine.submit(REQUESTS[name]).codes()
        others = [engine.submit(ENDLESS) for _ in range(2)]
        for other in others:
            first_chunk(other)
        in_company = engine.submit(REQUESTS[name]).codes()
        for other in others:
            other.cancel()
    np.testing.assert_array_equal(by_itself, in_company)


def test_many_threads_may_submit(model, alone):
    names = ["short", "greedy", "speaker", "one frame"]
    with Engine(model, max_batch=3) as engine, ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda name: engine.submit(REQUESTS[name]).codes(), names))
    for name, codes in zip(names, said, strict=True):
        np.testing.assert_array_equal(codes, alone[name][0])


@pytest.mark.parametrize("together", [1, 3])
def test_a_ticket_streams_what_is_generated(model, alone, together, monkeypatch):
    """However many rows the codec is given at once."""
    monkeypatch.setattr(engine_module, "rows_together", lambda num_rows: together)
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


def test_who_does_not_listen_gets_it_whole(model, alone):
    with Engine(model, max_batch=3) as engine:
        ticket = engine.submit(REQUESTS["speaker"], stream=False)
        (chunk,) = ticket
    np.testing.assert_array_equal(chunk, model.decode(alone["speaker"][0]))
    np.testing.assert_array_equal(ticket.result(), chunk)


def test_a_batch_is_its_requests(model, alone):
    notices = []
    said = model.generate_batch(
        list(REQUESTS.values()), max_batch=3, notify=lambda *notice: notices.append(notice)
    )
    for audio, (codes, _) in zip(said, alone.values(), strict=True):
        np.testing.assert_array_equal(audio, model.decode(codes))
    wanted = [(i, notice) for i, (_, told) in enumerate(alone.values()) for notice in told]
    assert notices == wanted
    assert model.generate_batch([]) == []


def test_arguments_are_those_of_generate(model, alone):
    with Engine(model, max_batch=3) as engine:
        ticket = engine.submit("Well.", 3, seed=3, max_audio_length_ms=720)
        assert ticket.request == REQUESTS["speaker"]
        np.testing.assert_array_equal(ticket.codes(), alone["speaker"][0])


class Resampling:
    """A guard that does not like what follows frame 7, the first time."""

    def __init__(self, *_):
        self.num_frames, self.is_content = 0, False

    def accept(self, frames):
        if not self.is_content and self.num_frames + len(frames) > 7:
            self.is_content = True
            kept, self.num_frames = frames[: 7 - self.num_frames], 7
            return Verdict(kept, Action.RESAMPLE, "stutters", 7)
        self.num_frames += len(frames)
        return Verdict(frames, Action.CONTINUE, "", self.num_frames)

    def finish(self):
        return np.zeros((0, CONFIG.num_codebooks), np.int32)


def test_going_back_in_a_batch_is_going_back_alone(model, monkeypatch):
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


def test_listeners_need_no_thread(model, alone):
    heard, late, offended = [], [], []

    def takes_offence(chunk):
        offended.append(chunk)
        raise ZeroDivisionError

    with Engine(model, max_batch=1) as engine:
        ticket = engine.submit(REQUESTS["short"])
        ticket.add_listener(heard.append)
        ticket.add_listener(takes_offence)
        ticket.codes()
        ticket.add_listener(late.append)
    assert len(offended) == 1
    for chunks in (heard, late):
        assert chunks.pop() is None
        whole = model.decode(alone["short"][0])
        np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)


# --- Borders ------------------------------------------------------------------------------------


class Watched:
    """What a batch is asked for: "join", and numbers of frames. It runs when the gate is open."""

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
def test_whoever_listens_waits_for_one_prompt_at_most(model, monkeypatch, stream):
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


def test_whoever_waits_for_a_prompt_waits_a_frame(model, monkeypatch):
    """Also when the others would have time for more."""
    monkeypatch.setattr(engine_module.Pace, "next_chunk", lambda self: 8)
    monkeypatch.setattr(active_request, "MAX_STEP_SECONDS", 1e9)
    watched = Watched(monkeypatch)
    with Engine(model, max_batch=3) as engine:
        tickets = [engine.submit(ENDLESS) for _ in range(3)]
        watched.gate.set()
        first_chunk(tickets[2])
        for ticket in tickets:
            ticket.cancel()
    assert watched.events[:6] == ["join", 1, "join", 1, "join", 8]


def test_who_has_enough_to_play_gets_long_chunks_though_others_are_in_a_hurry(model, monkeypatch):
    """The codec takes hardly longer for eight frames than for one."""
    monkeypatch.setattr(engine_module.Pace, "next_chunk", lambda self: 1)
    monkeypatch.setattr(engine_module.Pace, "can_wait", lambda self, _: self._num_played > 1)
    with Engine(model, max_batch=3) as engine:
        ticket, other = (engine.submit(REQUESTS[name]) for name in ("penalty", "short"))
        chunks = list(ticket)
        other.result()
    whole = model.decode(ticket.codes())
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-5)
    num_long, num_left = divmod(len(whole) // FRAME - 2, 8)
    assert num_long > 1
    sizes = [len(chunk) // FRAME for chunk in chunks]
    assert sizes == [1, 1, *[8] * num_long, *[1] * num_left]


def test_borders_are_close_where_frames_are_slow(model, alone, monkeypatch):
    watched = Watched(monkeypatch, seconds_per_frame=0.1)
    watched.gate.set()
    with Engine(model, max_batch=3) as engine:
        ticket = engine.submit(REQUESTS["another seed"], stream=False)
        np.testing.assert_array_equal(ticket.codes(), alone["another seed"][0])
    assert max(watched.events[1:]) <= active_request.MAX_STEP_SECONDS / 0.1


# --- The codec of a batch -----------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 2, 4])
def test_rows_decode_as_if_alone(model, together):
    """Streams of different lengths, one after another in four rows, which take turns."""
    rng = np.random.default_rng(together)
    decoder = engine_module.RowDecoder(model.codec, 4, together)
    streams = [rng.integers(0, 32, (n, CONFIG.num_codebooks), np.int32) for n in range(4, 20, 2)]
    waiting, speaking, chunks = list(range(8)), {}, [[] for _ in streams]
    said = [0] * 8
    while waiting or speaking:
        for row in set(range(4)) - speaking.keys():
            if waiting:
                speaking[row] = waiting.pop(0)
                decoder.restart(row)
        rows = [row for row in speaking if rng.random() < 0.6] or list(speaking)[:1]
        blocks = {row: streams[i][said[i] : said[i] + 2] for row, i in speaking.items()}
        for row, chunk in decoder.decode({row: blocks[row] for row in rows}).items():
            i = speaking[row]
            chunks[i].append(chunk)
            said[i] += 2
            if said[i] == len(streams[i]):
                del speaking[row]
    for codes, parts in zip(streams, chunks, strict=True):
        np.testing.assert_allclose(np.concatenate(parts), model.codec.decode(codes), atol=1e-5)


# --- How it ends --------------------------------------------------------------------------------


def test_a_cancelled_request_gives_its_row_away(model, alone):
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


def test_a_cancelled_request_that_waits_never_runs(model, alone, monkeypatch):
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
            waiting.codes()  # while the first one is still speaking
        running.cancel()
        np.testing.assert_array_equal(last.codes(), alone["another seed"][0])
    assert joined == [ENDLESS.seed, 2]


def test_cancelling_what_is_over_changes_nothing(model, alone):
    with Engine(model, max_batch=1) as engine:
        ticket = engine.submit(REQUESTS["short"])
        ticket.codes()
        ticket.cancel()
        np.testing.assert_array_equal(ticket.codes(), alone["short"][0])


def test_a_full_queue_refuses_or_lets_wait(model, alone):
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


def test_a_bad_request_is_refused_at_once(model):
    with Engine(model, max_batch=1) as engine:
        with pytest.raises(InputError, match="the text is empty"):
            engine.submit(" ")
        with pytest.raises(InputError, match="no room for its speech"):
            Engine.submit(_small(engine), "a " * 10)


def _small(engine: Engine) -> Engine:
    engine.max_seq_len = 8
    return engine


@pytest.mark.parametrize("sizes", [{"max_batch": 0}, {"max_queue": 0}])
def test_an_engine_without_room_is_refused(model, sizes):
    with pytest.raises(InputError, match="must be at least 1"):
        Engine(model, **sizes)


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_in_a_request_is_its_own(model, alone, monkeypatch, stream):
    accept = RequestState.accept

    def fail(self, codes):
        if self._request.seed == 66 and self._total >= 3:
            raise InputError("this one is bad")
        return accept(self, codes)

    monkeypatch.setattr(RequestState, "accept", fail)
    with Engine(model, max_batch=3) as engine:
        names = ["parts", "greedy", "short", "speaker"]
        before = [engine.submit(REQUESTS[name], stream=stream) for name in names[:2]]
        # Two parts, so that there is a border after frame 3 however long the chunks are.
        bad = engine.submit("One thing. Or another.", seed=66, stream=stream)
        after = [engine.submit(REQUESTS[name], stream=stream) for name in names[2:]]
        with pytest.raises(InputError, match="this one is bad"):
            list(bad)
        for name, ticket in zip(names, before + after, strict=True):
            np.testing.assert_array_equal(ticket.codes(), alone[name][0], name)


def test_an_error_of_the_machine_ends_those_who_speak(model, alone, monkeypatch):
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


def test_an_error_of_the_machine_forgets_the_prompts_it_had_to_read(model, alone, monkeypatch):
    run, gate, is_broken = DecodeBatch.run, threading.Event(), threading.Event()

    def break_with_one_unread(batch, *arguments, **named):
        assert gate.wait(WAIT_S)
        if sum(row is not None for row in batch._slots) == 2 and not is_broken.is_set():
            is_broken.set()
            raise RuntimeError("out of memory")
        return run(batch, *arguments, **named)

    monkeypatch.setattr(DecodeBatch, "run", break_with_one_unread)
    with Engine(model, max_batch=3) as engine:
        tickets = [engine.submit(ENDLESS) for _ in range(3)]
        gate.set()
        for ticket in tickets:
            with pytest.raises(CSMError, match="the engine failed"):
                ticket.codes()
        later = engine.submit(REQUESTS["short"])
        np.testing.assert_array_equal(later.codes(), alone["short"][0])


def test_nobody_waits_for_an_engine_that_is_dead(model, monkeypatch):
    def fail(self, *_, **__):
        raise RuntimeError("no memory")

    with Engine(model, max_batch=1) as engine:
        tickets = [engine.submit(ENDLESS), engine.submit("No.")]
        first_chunk(tickets[0])
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        monkeypatch.setattr(Engine, "_make_batch", fail)
        monkeypatch.setattr(DecodeBatch, "run", fail)
        for ticket in tickets:
            with pytest.raises(CSMError, match="the engine"):
                ticket.codes()
        with pytest.raises(CSMError, match="the engine is closed"):
            engine.submit("No.")


def test_closing_cancels(model):
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


def test_leaving_the_block_finishes_unless_by_an_error(model, alone):
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


def test_a_process_may_end_with_an_engine_at_work(own_cache):
    """Without `close`, and in the middle of a computation, which crashes Python."""
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


def test_what_requests_share_is_read_once_and_changes_nothing(model, monkeypatch):
    """The same codes as if the whole prompt had been read, for all rows that begin alike."""
    reads = []
    real = decode_batch.read_prefix
    monkeypatch.setattr(
        decode_batch, "read_prefix", lambda *a, **k: reads.append(1) or real(*a, **k)
    )
    voice = Segment(1, "Well.", codes=CODES)
    requests = [Request(text, 1, [voice], seed=5) for text in ("Hi.", "No.", "Well.")]
    with Engine(model, max_batch=2, max_seq_len=256) as engine:
        alone = [engine.submit(request).codes() for request in requests]
        assert not reads
        shared = [engine.submit(request, shared_turns=1).codes() for request in requests]
    assert len(reads) == 1
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_so_many_beginnings_are_remembered(model, monkeypatch):
    monkeypatch.setattr(decode_batch, "MAX_PREFIXES", 2)
    reads = []
    real = decode_batch.read_prefix
    monkeypatch.setattr(
        decode_batch, "read_prefix", lambda *a, **k: reads.append(1) or real(*a, **k)
    )
    voices = [Segment(1, text, codes=CODES) for text in ("One.", "Two.", "Three.")]
    with Engine(model, max_batch=1, max_seq_len=256) as engine:
        for which in (0, 1, 0, 2, 0, 1):
            request = Request("Hi.", 1, [voices[which]], max_audio_length_ms=80, shared_turns=1)
            engine.submit(request).codes()
    # The second had to go for the third, as it was not asked for as long as the first.
    assert len(reads) == 4


def test_a_background_request_lets_others_go_first(model):
    """It waits while only one row is free, and whoever comes later overtakes it."""
    over = []
    with Engine(model, max_batch=2, max_seq_len=1024) as engine:
        speaking = engine.submit(ENDLESS)
        background = engine.submit(REQUESTS["one frame"], background=True)
        background.add_listener(lambda chunk: chunk is None and over.append("background"))
        live = [engine.submit(REQUESTS["short"]) for _ in range(3)]
        for each in live:
            each.add_listener(lambda chunk: chunk is None and over.append("live"))
            each.codes()
        assert engine.num_waiting == 1
        speaking.cancel()
        background.codes()
    assert over == ["live"] * 3 + ["background"]


LONG_TEXT = "One thing. Or another. No more. And so on. At last."


@pytest.mark.parametrize("stream", [True, False])
def test_a_long_text_yields_between_its_parts(model, stream):
    """To requests of shares with fewer rows, and says the same."""
    long = [Request(LONG_TEXT, seed=seed) for seed in range(2)]
    alone = [model.generate_codes(request) for request in long]
    over = []
    with Engine(model, max_batch=2) as engine:
        tickets = [engine.submit(request, share="long", stream=stream) for request in long]
        for ticket in tickets:
            ticket.add_listener(lambda chunk: chunk is None and over.append("long"))
        if stream:
            first_chunk(tickets[1])
        for number in range(3):
            short = engine.submit(REQUESTS["short"], share=f"short {number}")
            short.add_listener(lambda chunk: chunk is None and over.append("short"))
        background = engine.submit(REQUESTS["one frame"], background=True)
        background.add_listener(lambda chunk: chunk is None and over.append("background"))
        for ticket, codes in zip(tickets, alone, strict=True):
            np.testing.assert_array_equal(ticket.codes(), codes)
            np.testing.assert_allclose(ticket.result(), model.decode(codes), atol=1e-5)
        background.codes()
    assert over == ["short"] * 3 + ["long"] * 2 + ["background"]


@pytest.mark.parametrize("together", [1, 2])
def test_yielding_does_not_change_a_sample(model, together, monkeypatch):
    """The codec goes on in another row where it was."""
    monkeypatch.setattr(engine_module, "rows_together", lambda num_rows: together)
    monkeypatch.setattr(engine_module.Pace, "next_chunk", lambda self: 1)
    monkeypatch.setattr(engine_module.Pace, "can_wait", lambda self, _: False)
    taken, take = [], engine_module.RowDecoder.take

    def note(decoder, row):
        taken.append(row)
        return take(decoder, row)

    monkeypatch.setattr(engine_module.RowDecoder, "take", note)
    request = Request(LONG_TEXT, seed=3)
    with Engine(model, max_batch=2) as engine:
        undisturbed = engine.submit(request).result()
        assert not taken
        tickets = [engine.submit(request, share=share) for share in "abc"]
        for ticket in tickets:
            np.testing.assert_array_equal(ticket.result(), undisturbed)
    assert taken


def test_a_row_is_kept_for_shares_without_one(model):
    with Engine(model, max_batch=3, kept_rows=1) as engine:
        greedy = [engine.submit(ENDLESS, share="a") for _ in range(4)]
        first_chunk(greedy[1])
        engine.submit(REQUESTS["short"], share="b").codes()
        assert engine.num_speaking == 2
        for ticket in greedy:
            ticket.cancel()


def test_chunks_are_not_kept_without_keep(model, alone):
    heard = []
    with Engine(model, max_batch=1) as engine:
        ticket = engine.submit(REQUESTS["short"], keep=False)
        ticket.codes()  # some chunks are there before the listener
        ticket.add_listener(heard.append)
        assert heard.pop() is None
        assert not ticket._chunks
        whole = model.decode(alone["short"][0])
        np.testing.assert_allclose(np.concatenate(heard), whole, atol=1e-5)
        np.testing.assert_array_equal(ticket.result(), whole)


def test_an_engine_that_may_finish_is_closed_in_time(model, alone):
    engine = Engine(model, max_batch=2)
    endless, short = engine.submit(ENDLESS), engine.submit(REQUESTS["one frame"])
    short.codes()
    started = time.monotonic()
    engine.close(finish=True, seconds=0.5)
    assert time.monotonic() - started < 10
    np.testing.assert_array_equal(short.codes(), alone["one frame"][0])
    with pytest.raises(RequestCancelledError):
        endless.codes()


def test_the_time_of_a_request_is_told(model):
    with Engine(model, max_batch=1, max_seq_len=256) as engine:
        started = time.perf_counter()
        tickets = [engine.submit(REQUESTS["short"]) for _ in range(2)]
        first, second = (ticket.codes() is not None and ticket.timing for ticket in tickets)
        elapsed = time.perf_counter() - started
    # In the one row the second waits for the first, and nothing is counted twice.
    assert second.queue > first.queue
    spent = [each.prefill + each.frames + each.codec for each in (first, second)]
    assert min(first.prefill, first.frames, first.codec) > 0
    assert sum(spent) < elapsed


@pytest.mark.parametrize("count", [-1, 2])
def test_no_more_turns_are_shared_than_there_are(count):
    with pytest.raises(InputError, match=f"shared_turns is {count}, but there are 1 turns"):
        Request("Hi.", context=[Segment(0, "Well.", codes=CODES)], shared_turns=count)


def test_an_unwanted_warm_up_is_cancelled(model):
    with (
        Engine(model, max_batch=1, max_seq_len=128) as engine,
        pytest.raises(RequestCancelledError),
    ):
        engine.warm_up(is_unwanted=lambda: True)
