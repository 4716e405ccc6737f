"""What requests share: slots, by their shares, and the beginnings of their prompts."""

import numpy as np
import pytest
from engine_requests import (
    CODES,
    ENDLESS,
    LONG_TEXT,
    REQUESTS,
    first_chunk,
    with_inference,
)

from csm_jax import Engine, InputError, Request, Segment
from csm_jax.inference import decode_batch, engine_core
from csm_jax.inference.pacing import Pace
from csm_jax.inference.row_decoder import RowDecoder


def test_a_shared_prefix_is_prefilled_once_and_changes_no_code(model, monkeypatch):
    """The same codes as with the whole prompt prefilled, for all prompts that begin alike."""
    prefills = []
    real = decode_batch.prefill_prefix
    monkeypatch.setattr(
        decode_batch, "prefill_prefix", lambda *a, **k: prefills.append(1) or real(*a, **k)
    )
    voice = Segment(1, "Well.", codes=CODES)
    requests = [Request(text, 1, [voice], seed=5) for text in ("Hi.", "No.", "Well.")]
    with Engine(model, max_batch=2, max_seq_len=256) as engine:
        alone = [engine.submit(request).codes() for request in requests]
        assert not prefills
        shared = [engine.submit(request, shared_turns=1).codes() for request in requests]
    assert len(prefills) == 1
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_least_recently_used_prefix_is_dropped(model, monkeypatch):
    model = with_inference(model, max_prefixes=2)
    prefills = []
    real = decode_batch.prefill_prefix
    monkeypatch.setattr(
        decode_batch, "prefill_prefix", lambda *a, **k: prefills.append(1) or real(*a, **k)
    )
    voices = [Segment(1, text, codes=CODES) for text in ("One.", "Two.", "Three.")]
    with Engine(model, max_batch=1, max_seq_len=256) as engine:
        for which in (0, 1, 0, 2, 0, 1):
            request = Request("Hi.", 1, [voices[which]], max_audio_length_ms=80, shared_turns=1)
            engine.submit(request).codes()
    # The third replaces the second, which was last used before the first.
    assert len(prefills) == 4


@pytest.mark.parametrize("count", [-1, 2])
def test_shared_turns_beyond_the_context_are_refused(count):
    with pytest.raises(InputError, match=f"shared_turns is {count}, but there are 1 turns"):
        Request("Hi.", context=[Segment(0, "Well.", codes=CODES)], shared_turns=count)


def test_other_requests_go_before_a_background_request(model):
    """It waits while only one slot is free, and later requests overtake it."""
    over = []
    with Engine(model, max_batch=2, max_seq_len=1024) as engine:
        running = engine.submit(ENDLESS)
        background = engine.submit(REQUESTS["one frame"], background=True)
        background.add_listener(lambda chunk: chunk is None and over.append("background"))
        live = [engine.submit(REQUESTS["short"]) for _ in range(3)]
        for each in live:
            each.add_listener(lambda chunk: chunk is None and over.append("live"))
            each.codes()
        assert engine.num_waiting == 1
        running.cancel()
        background.codes()
    assert over == ["live"] * 3 + ["background"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_long_text_frees_its_slot_between_its_parts_and_has_equal_codes(model, stream):
    """To requests of shares with fewer slots, and its codes are the same."""
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
def test_freeing_the_slot_between_parts_changes_no_sample(model, together, monkeypatch):
    """The codec continues its stream in another row."""
    monkeypatch.setattr(engine_core, "rows_together", lambda num_rows: together)
    monkeypatch.setattr(Pace, "next_chunk", lambda self: 1)
    monkeypatch.setattr(Pace, "can_wait", lambda self, _: False)
    taken, take = [], RowDecoder.take

    def note(decoder, row):
        taken.append(row)
        return take(decoder, row)

    monkeypatch.setattr(RowDecoder, "take", note)
    request = Request(LONG_TEXT, seed=3)
    with Engine(model, max_batch=2) as engine:
        undisturbed = engine.submit(request).result()
        assert not taken
        tickets = [engine.submit(request, share=share) for share in "abc"]
        for ticket in tickets:
            np.testing.assert_array_equal(ticket.result(), undisturbed)
    assert taken


def test_kept_rows_are_for_shares_without_a_slot(model):
    with Engine(model, max_batch=3, kept_rows=1) as engine:
        greedy = [engine.submit(ENDLESS, share="a") for _ in range(4)]
        first_chunk(greedy[1])
        engine.submit(REQUESTS["short"], share="b").codes()
        assert engine.num_running == 2
        for ticket in greedy:
            ticket.cancel()
