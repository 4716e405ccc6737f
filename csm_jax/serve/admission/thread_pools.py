"""The threads in which the server calls what would block its event loop."""

import asyncio
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from csm_jax.inference.scheduler import FairQueue
from csm_jax.serve.admission.caller import Caller

T = TypeVar("T")

# Threads for short waits, such as those for the disk.
_NUM_IO_THREADS = 4
# Threads that decode and compress audio: what they call releases the interpreter's lock.
_NUM_WORK_THREADS = max(4, os.cpu_count() or 1)


class ThreadPools:
    """All threads of a server besides those of the engine and the database.

    Each kind of work has a pool of its own, so that it never waits for work that takes longer.
    """

    def __init__(self):
        self._io = ThreadPoolExecutor(_NUM_IO_THREADS, "csm_jax.serve.io")
        self._work = FairThreadPool(_NUM_WORK_THREADS, "csm_jax.serve.work")
        # One thread each: the codec and the compiler use all cores of the machine.
        self._encode = FairThreadPool(1, "csm_jax.serve.encode")
        self._compile = ThreadPoolExecutor(1, "csm_jax.serve.compile")

    async def wait(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function that waits shortly, such as for the disk."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._io, functools.partial(function, *arguments))

    async def work(self, caller: Caller, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function that computes, such as a decoder, when it is the caller's turn."""
        return await self._work.run(caller, function, *arguments)

    async def encode(self, caller: Caller, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function that runs the codec when it is the caller's turn."""
        return await self._encode.run(caller, function, *arguments)

    async def compile(self, function: Callable[[], None]) -> None:
        """Calls a function that compiles programs, which takes seconds."""
        await asyncio.get_running_loop().run_in_executor(self._compile, function)

    def close(self) -> None:
        """Cancels the calls that have not begun, and waits for none that has."""
        self._io.shutdown(wait=False, cancel_futures=True)
        self._work.close()
        self._encode.close()
        self._compile.shutdown(wait=False, cancel_futures=True)


@dataclass(eq=False)
class _Call:
    caller: Caller
    function: Callable[[], Any]
    result: asyncio.Future


class FairThreadPool:
    """Threads that callers share fairly; of several threads one is for callers that use none.

    A call that is cancelled before its turn never runs. To be used from one event loop.
    """

    def __init__(self, num_threads: int, name: str):
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._queue: FairQueue[_Call] = FairQueue()

    async def run(self, caller: Caller, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function when it is this caller's turn; its exception is raised here."""
        result = asyncio.get_running_loop().create_future()
        call = _Call(caller, functools.partial(function, *arguments), result)
        self._queue.push(call, caller.share, caller.weight)
        self._start()
        try:
            return await result
        finally:
            # The result of a call that has begun is dropped.
            if result.cancelled():
                self._remove(call)

    def close(self) -> None:
        """Cancels the calls that have not begun."""
        self._queue.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        while (free := self._num_threads - self._queue.num_running) > 0:
            call = self._queue.pop(idle_only=free == 1 and self._num_threads > 1)
            if call is None:
                return
            running = asyncio.wrap_future(self._threads.submit(call.function))
            running.add_done_callback(functools.partial(self._finish, call))

    def _finish(self, call: _Call, running: asyncio.Future) -> None:
        self._queue.finish(call.caller.share)
        error = None if running.cancelled() else running.exception()
        if not call.result.done():
            if running.cancelled():
                call.result.cancel()
            elif error is not None:
                call.result.set_exception(error)
            else:
                call.result.set_result(running.result())
        self._start()

    def _remove(self, call: _Call) -> None:
        if call in list(self._queue):
            self._queue.remove(call)
