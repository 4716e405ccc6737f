"""Fair thread pools: callers take turns, and calls that are cancelled in time never run."""

import asyncio
import threading

import pytest

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.admission.thread_pools import FairThreadPool

A, B = (Caller(share=name) for name in "ab")


def test_callers_take_turns():
    """A new caller waits for at most one call of another."""

    async def scenario() -> list[str]:
        order, gate, pool = [], threading.Event(), FairThreadPool(1, "test")

        def work(name: str) -> None:
            gate.wait(10)
            order.append(name)

        calls = [asyncio.create_task(pool.run(A, work, f"a{i}")) for i in range(5)]
        await asyncio.sleep(0.05)
        calls += [asyncio.create_task(pool.run(B, work, f"b{i}")) for i in range(2)]
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(*calls)
        pool.close()
        return order

    assert asyncio.run(scenario()) == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]


def test_one_caller_cannot_use_all_threads():
    async def scenario() -> None:
        gate, pool = threading.Event(), FairThreadPool(2, "test")
        blocked = [asyncio.create_task(pool.run(A, gate.wait, 10)) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(pool.run(B, lambda: "heard"), 5) == "heard"
        gate.set()
        await asyncio.gather(*blocked)
        pool.close()

    asyncio.run(scenario())


def test_a_call_that_is_cancelled_before_its_turn_never_runs():
    async def scenario() -> None:
        ran, gate, pool = [], threading.Event(), FairThreadPool(1, "test")
        first = asyncio.create_task(pool.run(A, gate.wait, 10))
        waiting = [asyncio.create_task(pool.run(A, ran.append, i)) for i in range(5)]
        await asyncio.sleep(0.05)
        for task in waiting[:4]:
            task.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(first, waiting[4])
        assert ran == [4]
        pool.close()

    asyncio.run(scenario())


def test_exceptions_of_a_function_are_raised_in_its_caller():
    async def scenario() -> None:
        pool = FairThreadPool(1, "test")
        with pytest.raises(ZeroDivisionError):
            await pool.run(A, lambda: 1 / 0)
        assert await pool.run(A, lambda: 5) == 5
        # A call that was cancelled while it ran leaves the thread to others.
        gate = threading.Event()
        task = asyncio.create_task(pool.run(A, gate.wait, 10))
        await asyncio.sleep(0.05)
        task.cancel()
        gate.set()
        assert await asyncio.wait_for(pool.run(B, lambda: 6), 5) == 6
        pool.close()

    asyncio.run(scenario())
