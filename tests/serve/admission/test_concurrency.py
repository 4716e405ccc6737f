"""Places are bounded, and one caller cannot have all of them while others ask."""

import asyncio
import contextlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.admission.concurrency import Places, Sockets
from csm_jax.serve.errors import ApiError

A, B, C = (Caller(share=name) for name in "abc")


def fill(places: Places, caller: Caller, most: int = 1000) -> list:
    """Takes places until one is refused."""
    refusals = []

    async def take() -> list:
        taken = []
        for _ in range(most):
            try:
                taken.append(await places.take(caller))
            except ApiError as refused:
                refusals.append(refused)
                break
        return taken

    taken = asyncio.run(take())
    for error in refusals:
        assert (error.status, error.code) == (429, "queue_full")
        assert error.retry_after >= 1
    return taken


def test_a_lone_caller_has_all_places():
    assert len(fill(Places(40), A)) == 40


def test_a_newcomer_has_a_place_beside_one_who_has_all():
    places = Places(40)
    first = fill(places, A)
    second = fill(places, B)
    assert len(second) == 20
    # And so has one more: each its share.
    third = fill(places, C)
    assert len(third) == 14
    for place in third:
        place.release()
    # What comes free goes to the one who has less, until both have as many.
    for place in first[:30]:
        place.release()
    second += fill(places, B)
    assert len(fill(places, A)) < len(second)
    assert len(second) >= 20


def test_places_are_shared_by_weight():
    places = Places(40)
    heavy = Caller(share="heavy", weight=3.0)
    first, second = fill(places, A, 1), fill(places, heavy)
    assert len(second) >= 30
    assert len(first + fill(places, A)) >= 10


def test_many_callers_with_one_place_each_fill_it():
    places = Places(16)
    taken = [fill(places, Caller(share=str(number)), 1) for number in range(40)]
    assert sum(map(len, taken)) == places.total == 32


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.booleans()), max_size=80))
def test_no_more_than_all_and_none_is_lost(events):
    places, held = Places(8), []
    for caller, takes in events:
        if takes:
            held += fill(places, caller, 1)
        elif held:
            held.pop(0).release()
        assert places.num_held == len(held) <= places.total
    per_share = Counter(place.caller.share for place in held)
    newcomer = fill(places, Caller(share="new"), 1)
    assert newcomer or len(per_share) > 1
    for place in held + newcomer:
        place.release()
        place.release()  # changes nothing
    assert len(fill(places, A)) == 8


def test_a_place_is_given_back_by_its_block_unless_it_is_kept():
    async def scenario() -> None:
        places = Places(1)
        with await places.take(A):
            assert places.num_held == 1
        assert not places.num_held
        with await places.take(A) as kept:
            kept.keep()
        assert places.num_held == 1
        kept.release()
        with contextlib.suppress(ZeroDivisionError), await places.take(A) as kept:
            kept.keep()
            raise ZeroDivisionError
        assert not places.num_held

    asyncio.run(scenario())


def test_a_waiting_request_gets_the_next_place():
    async def scenario() -> None:
        places = Places(1)
        first = await places.take(A)
        waiting = asyncio.create_task(places.take(A, wait=True))
        given_up = asyncio.create_task(places.take(A, wait=True))
        await asyncio.sleep(0)
        given_up.cancel()
        assert not waiting.done()
        first.release()
        (await asyncio.wait_for(waiting, 5)).release()
        assert not places.num_held

    asyncio.run(scenario())


def test_open_sockets_are_counted():
    sockets = Sockets(1)
    with sockets.opened(A):
        with pytest.raises(ApiError, match="1 WebSockets"), sockets.opened(A):
            pass
        with sockets.opened(B):
            pass
    with sockets.opened(A):
        pass
