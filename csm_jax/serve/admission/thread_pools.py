"""Threads that are shared fairly between callers."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from csm_jax.scheduler import FairQueue
from csm_jax.serve.admission.caller import Caller

T = TypeVar("T")


@dataclass(eq=False)
class _Call:
    caller: Caller
    function: Callable[[], Any]
    result: asyncio.Future


class FairPool:
    """Runs functions in threads: callers take turns, and of several threads one is for newcomers.

    What is cancelled before its turn never runs. To be used from one event loop.
    """

    def __init__(self, num_threads: int, name: str):
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._queue: FairQueue[_Call] = FairQueue()

    async def run(self, caller: Caller, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function when it is this caller's turn; what it raises is raised here."""
        result = asyncio.get_running_loop().create_future()
        call = _Call(caller, functools.partial(function, *arguments), result)
        self._queue.push(call, caller.share, caller.weight)
        self._start()
        try:
            return await result
        finally:
            # Of what has begun, the result is thrown away.
            if result.cancelled():
                self._leave(call)

    def close(self) -> None:
        """Runs nothing that has not begun."""
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

    def _leave(self, call: _Call) -> None:
        if call in list(self._queue):
            self._queue.remove(call)
