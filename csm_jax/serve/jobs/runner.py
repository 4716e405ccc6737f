"""Runs jobs: they are submitted, and polled, fetched or cancelled later.

A job is stored before it is acknowledged. With a data directory, a job that is not completed when
the process ends is run again by the next one, from its stored request.
"""

import asyncio
import contextlib
import functools
import json
import logging
import time
import uuid
from typing import Any, NamedTuple

from csm_jax.errors import QueueFullError
from csm_jax.inference.scheduler import FairQueue
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import ApiError, QuotaError, StorageError, as_api_error
from csm_jax.serve.jobs.job import (
    Job,
    JobHandler,
    Status,
    cancelled_error,
    job_from_row,
    outcome_of,
)
from csm_jax.serve.jobs.webhooks import Webhooks
from csm_jax.serve.middleware.request_log import request_id
from csm_jax.serve.store.jobs import Delivery, JobStore

logger = logging.getLogger("csm_jax.serve")

# Attempts at a job, if the process is killed during each of them.
MAX_ATTEMPTS = 3
# How often a job is delayed because the engine is full, or its caller over a limit.
_MAX_DELAYS = 100
# Waiting jobs of all shares together, in multiples of those of one.
_TOTAL_FACTOR = 8
# How long the response to a cancellation waits for the end of the job.
_CANCEL_SECONDS = 5.0


class _Delay(NamedTuple):
    """A job is run later, because the engine is full or its caller over a limit."""

    seconds: float


class JobRunner:
    """Runs jobs concurrently: shares take turns, and jobs of one share run in order.

    Of several slots one is for shares that use none.
    """

    def __init__(self, store: JobStore, webhooks: Webhooks, max_running: int, max_waiting: int):
        """Starts without jobs.

        Args:
          max_running: jobs that run at the same time.
          max_waiting: jobs of one share that may wait.
        """
        self._store = store
        self._webhooks = webhooks
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._handlers: dict[str, JobHandler] = {}
        # Jobs that are not completed, in the order of submission.
        self._jobs: dict[str, Job] = {}
        # Those of them that wait for a slot.
        self._queue: FairQueue[Job] = FairQueue()
        self._is_closing = False
        self._is_closed = False

    def register(self, kind: str, handler: JobHandler) -> None:
        """Sets the handler for jobs of a kind."""
        self._handlers[kind] = handler

    async def start(self) -> None:
        """Continues the jobs and webhooks that the last process left."""
        for row in await self._store.unfinished():
            job = job_from_row(row)
            job.log("taken up again after a restart of the server")
            self._jobs[job.id] = job
            self._queue.push(job, job.caller.share, job.caller.weight)
        await self._webhooks.start()
        self._advance()

    async def submit(self, caller: Caller, kind: str, body: str, webhook: str | None = None) -> Job:
        """Stores a job, and appends it to the queue of its share.

        Args:
          body: the request, from which it can be run again.

        Raises:
          ApiError: too many jobs wait.
          QuotaError, StorageError: it cannot be stored.
        """
        self._check_room(caller)
        job = Job(str(uuid.uuid4()), caller, kind, webhook, is_stored=False)
        job.log(f"submitted by request {request_id()}")
        # It counts as waiting while it is being stored.
        self._jobs[job.id] = job
        try:
            await self._store.add(job.id, caller, kind, body, webhook, json.dumps(job.logs))
        except BaseException:
            del self._jobs[job.id]
            raise
        job.is_stored = True
        self._queue.push(job, caller.share, caller.weight)
        self._advance()
        return job

    async def find(self, job_id: str, owner: str) -> Job:
        """Finds a job by its id. Raises `ApiError` if this owner has none of that id."""
        job = self._jobs.get(job_id)
        if job is not None and job.caller.owner == owner:
            return job
        if job is None and (row := await self._store.find(job_id, owner)):
            return job_from_row(row, Status.COMPLETED)
        raise ApiError(404, f"there is no request {job_id[:80]!r}", code="not_found")

    def is_active(self, job: Job) -> bool:
        """Whether the job can still change."""
        return job.id in self._jobs

    def position(self, job: Job) -> int:
        """The number of jobs before it in the queue of its share."""
        queued = [each.id for each in self._queued if each.caller.share == job.caller.share]
        return queued.index(job.id) if job.id in queued else 0

    async def cancel(self, job: Job) -> bool:
        """Cancels a job; returns False if it is completed or cancelled already."""
        if job.is_ending or job.status is Status.COMPLETED or self._is_closed:
            return False
        if job.task is None:
            self._dequeue(job)
            task = self._start_ending(job, cancelled_error())
        else:
            task = job.task
            job.is_ending = True
            task.cancel()
        await asyncio.wait({task}, timeout=_CANCEL_SECONDS)
        return True

    async def close(self, seconds: float) -> None:
        """Waits for jobs for so many seconds, and leaves the others to the next process.

        With a data directory it waits for running jobs only.
        """
        self._is_closing = True
        deadline = time.monotonic() + seconds
        while (tasks := self._tasks) and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        self._is_closed = True
        self._queue.clear()
        for job in self._jobs.values():
            _stop_timer(job)
        tasks = self._tasks
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _tasks(self) -> list[asyncio.Task]:
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        return [task for task in tasks if not task.done()]

    @property
    def _queued(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.is_stored and job.task is None]

    @property
    def _leaves_jobs(self) -> bool:
        """Whether jobs that are not completed are left to the next process."""
        return self._is_closing and self._store.is_durable

    @property
    def _has_stopped(self) -> bool:
        return self._is_closed or self._leaves_jobs

    def _check_room(self, caller: Caller) -> None:
        waiting = [job.caller.share for job in self._jobs.values() if job.task is None]
        own = waiting.count(caller.share)
        if own >= self._max_waiting or len(waiting) >= _TOTAL_FACTOR * self._max_waiting:
            message = f"{own} of your jobs are waiting, and {len(waiting)} of all"
            raise ApiError(429, message, code="queue_full", retry_after=10)

    def _advance(self) -> None:
        """Starts waiting jobs while there are free slots."""
        while not self._has_stopped and (free := self._max_running - self._queue.num_running) > 0:
            job = self._queue.pop(idle_only=free == 1 and self._max_running > 1)
            if job is None:
                return
            job.task = asyncio.create_task(self._run(job))
            job.task.add_done_callback(functools.partial(self._free_slot, job))

    def _free_slot(self, job: Job, task: asyncio.Task) -> None:
        """Decides what becomes of a job that has left its slot, and starts others."""
        self._queue.finish(job.caller.share)
        is_over = not task.cancelled()
        delay = task.result() if is_over and task.exception() is None else None
        if job.is_ending and delay is not None:
            is_over = False
        if not is_over and not self._is_closed and (job.is_ending or not self._leaves_jobs):
            # It was cancelled before its first step, or while it was delayed.
            self._start_ending(job, cancelled_error())
        elif delay is not None:
            self._delay(job, delay)
        else:
            self._forget(job, task)
        self._advance()

    def _delay(self, job: Job, delay: _Delay) -> None:
        """Lets a job wait without a slot; after that it is the next of its share."""
        job.task = None
        job.set_status(Status.QUEUED)
        if not self._is_closed:
            loop = asyncio.get_running_loop()
            job.timer = loop.call_later(delay.seconds, self._requeue, job)

    def _requeue(self, job: Job) -> None:
        job.timer = None
        self._queue.push_front(job, job.caller.share, job.caller.weight)
        self._advance()

    def _dequeue(self, job: Job) -> None:
        """Removes a job without a slot from the queue, or ends its delay."""
        if job.timer is not None:
            _stop_timer(job)
        elif job.is_stored:
            self._queue.remove(job)

    def _start_ending(self, job: Job, error: ApiError) -> asyncio.Task:
        """Begins to store the end of a job that has no slot."""
        job.error, job.is_ending = error, True
        job.task = task = asyncio.create_task(self._end(job))
        task.add_done_callback(functools.partial(self._forget, job))
        return task

    def _forget(self, job: Job, task: asyncio.Task) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a job was interrupted until the next start", exc_info=error)
        self._jobs.pop(job.id, None)
        job.notify()

    async def _run(self, job: Job) -> _Delay | None:
        """Runs a job, and stores its end, unless it has to be run later."""
        started = time.perf_counter()
        try:
            await self._store.begin(job.id)
            job.set_status(Status.RUNNING)
            job.result = await self._call_handler(job)
            job.log("done")
        except asyncio.CancelledError:
            if self._leaves_jobs and not job.is_ending:
                await self._return_to_store(job)
                return None
            job.error = cancelled_error()
        except Exception as error:
            if (delay := _delay_after(job, error)) is not None:
                await self._return_to_store(job)
                return delay
            job.error = as_api_error(error)
            job.log(str(job.error))
        job.seconds = time.perf_counter() - started
        await self._end(job)
        return None

    async def _call_handler(self, job: Job) -> dict[str, Any]:
        if job.kind not in self._handlers:
            raise ApiError(500, f"jobs of kind {job.kind} are not run by this version")
        if job.attempts >= MAX_ATTEMPTS:
            raise ApiError(500, f"the server ended {job.attempts} times while it ran this job")
        return await self._handlers[job.kind].run(job, await self._store.body(job.id))

    async def _return_to_store(self, job: Job) -> None:
        """Takes back the attempt, because the job is run later, or by the next process."""
        with contextlib.suppress(StorageError):  # it is run again in any case
            await self._store.give_back(job.id)

    async def _end(self, job: Job) -> None:
        """Stores the outcome of a job together with the body for its webhook."""
        job.is_ending = True
        try:
            delivery = await self._store_end(job)
        except QuotaError as error:
            job.result, job.error = None, as_api_error(error)
            delivery = await self._store_end(job)
        job.set_status(Status.COMPLETED)
        if delivery is not None:
            self._webhooks.post(delivery)

    async def _store_end(self, job: Job) -> Delivery | None:
        """Raises `QuotaError` if the body for the webhook is too large."""
        post = None if job.webhook is None else await self._webhook_body(job)
        if (handler := self._handlers.get(job.kind)) and not handler.keeps_result:
            job.result = None
        return await self._store.end(job.id, outcome_of(job), post)

    async def _webhook_body(self, job: Job) -> bytes | None:
        if (handler := self._handlers.get(job.kind)) is None:
            return None
        body = await self._store.body(job.id)
        return await asyncio.to_thread(lambda: json.dumps(handler.webhook_body(job, body)).encode())


def _delay_after(job: Job, error: Exception) -> _Delay | None:
    """The delay of a job after an error that passes; None after any other error."""
    if not isinstance(error, ApiError | QueueFullError):
        return None
    busy = as_api_error(error)
    if busy.status != 429 or busy.code == "storage_full" or job.num_delays >= _MAX_DELAYS:
        return None
    job.num_delays += 1
    return _Delay(busy.retry_after or 1)


def _stop_timer(job: Job) -> None:
    if job.timer is not None:
        job.timer.cancel()
        job.timer = None
