"""Permits are limited, and one caller cannot have all of them while others need some."""

import asyncio
import contextlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.admission.concurrency import RequestLimiter, StreamLimiter
from csm_jax.serve.errors import ApiError

A, B, C = (Caller(share=name) for name in "abc")


def fill(limiter: RequestLimiter, caller: Caller, most: int = 1000) -> list:
    """Acquires permits until one is refused."""
    refusals = []

    async def take() -> list:
        taken = []
        for _ in range(most):
            try:
                taken.append(await limiter.acquire(caller))
            except ApiError as refused:
                refusals.append(refused)
                break
        return taken

    taken = asyncio.run(take())
    for error in refusals:
        assert (error.status, error.code) == (429, "queue_full")
        assert error.retry_after >= 1
    return taken


def test_a_single_caller_can_have_all_permits():
    assert len(fill(RequestLimiter(40), A)) == 40


def test_a_new_caller_gets_permits_beside_a_caller_with_many():
    limiter = RequestLimiter(40)
    first = fill(limiter, A)
    second = fill(limiter, B)
    assert len(second) == 20
    # A third caller gets its share, too.
    third = fill(limiter, C)
    assert len(third) == 14
    for place in third:
        place.release()
    # Released permits go to the caller with fewer, until both have the same number.
    for place in first[:30]:
        place.release()
    second += fill(limiter, B)
    assert len(fill(limiter, A)) < len(second)
    assert len(second) >= 20


def test_permits_are_shared_by_weight():
    limiter = RequestLimiter(40)
    heavy = Caller(share="heavy", weight=3.0)
    first, second = fill(limiter, A, 1), fill(limiter, heavy)
    assert len(second) >= 30
    assert len(first + fill(limiter, A)) >= 10


def test_many_callers_with_one_permit_each_get_all():
    limiter = RequestLimiter(16)
    taken = [fill(limiter, Caller(share=str(number)), 1) for number in range(40)]
    assert sum(map(len, taken)) == limiter.total == 32


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.booleans()), max_size=80))
def test_permits_never_exceed_the_total_and_none_is_lost(events):
    limiter, held = RequestLimiter(8), []
    for caller, takes in events:
        if takes:
            held += fill(limiter, caller, 1)
        elif held:
            held.pop(0).release()
        assert limiter.num_acquired == len(held) <= limiter.total
    per_share = Counter(place.caller.share for place in held)
    newcomer = fill(limiter, Caller(share="new"), 1)
    assert newcomer or len(per_share) > 1
    for place in held + newcomer:
        place.release()
        place.release()  # changes nothing
    assert len(fill(limiter, A)) == 8


def test_a_permit_is_released_by_its_block_unless_it_is_kept():
    async def scenario() -> None:
        limiter = RequestLimiter(1)
        with await limiter.acquire(A):
            assert limiter.num_acquired == 1
        assert not limiter.num_acquired
        with await limiter.acquire(A) as permit:
            permit.keep()
        assert limiter.num_acquired == 1
        permit.release()
        with contextlib.suppress(ZeroDivisionError), await limiter.acquire(A) as permit:
            permit.keep()
            raise ZeroDivisionError
        assert not limiter.num_acquired

    asyncio.run(scenario())


def test_a_waiting_request_gets_the_next_permit():
    async def scenario() -> None:
        limiter = RequestLimiter(1)
        first = await limiter.acquire(A)
        waiting = asyncio.create_task(limiter.acquire(A, wait=True))
        given_up = asyncio.create_task(limiter.acquire(A, wait=True))
        await asyncio.sleep(0)
        given_up.cancel()
        assert not waiting.done()
        first.release()
        (await asyncio.wait_for(waiting, 5)).release()
        assert not limiter.num_acquired

    asyncio.run(scenario())


def test_open_streams_are_limited():
    sockets = StreamLimiter(1)
    with sockets.opened(A):
        with pytest.raises(ApiError, match="1 WebSockets"), sockets.opened(A):
            pass
        with sockets.opened(B):
            pass
    with sockets.opened(A):
        pass
