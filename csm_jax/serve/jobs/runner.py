"""Requests that go on without their client: submitted, polled, fetched or cancelled later.

A job is stored before it is acknowledged. With a data directory, a job that is not over when the
process ends is run again by the next one, from its stored request.
"""

import asyncio
import contextlib
import functools
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any, NamedTuple

from csm_jax.errors import QueueFullError
from csm_jax.scheduler import FairQueue
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import ApiError, as_api_error
from csm_jax.serve.jobs.webhooks import Webhooks
from csm_jax.serve.middleware.request_log import request_id
from csm_jax.serve.store.errors import QuotaError, StorageError
from csm_jax.serve.store.jobs import Delivery, JobRow, JobStore, Outcome

logger = logging.getLogger("csm_jax.serve")

# A request that ends the process each time is not begun once more after so many.
MAX_ATTEMPTS = 3
# How often a job is put back whose caller asks for more than the engine or the quotas allow.
_MAX_DELAYS = 100
# All shares together can have so many times as many jobs waiting as one.
_SHARES = 8
# What a cancelled job gets to end in before its client is answered.
_CANCEL_SECONDS = 5.0


class Status(Enum):
    QUEUED = "IN_QUEUE"
    RUNNING = "IN_PROGRESS"
    OVER = "COMPLETED"


@dataclass(eq=False)
class Job:
    """A request that goes on without its client.

    Attributes:
      caller: whose it is; other owners do not find it.
      kind: which API runs it.
      result, error: one of them, when it is over.
      logs: messages of its progress so far, with times.
      task: runs it, while it is running.
      is_stored: it is in the store, so it can be run.
      is_ending: it was cancelled, or its outcome is known and is being stored.
      num_delays: how often it was put back.
      timer: ends its delay, while it is put back.
    """

    id: str
    caller: Caller
    kind: str
    webhook: str | None = None
    attempts: int = 0
    status: Status = Status.QUEUED
    result: dict | None = None
    error: ApiError | None = None
    logs: list[dict[str, str]] = field(default_factory=list)
    task: asyncio.Task | None = None
    is_stored: bool = True
    is_ending: bool = False
    num_delays: int = 0
    timer: asyncio.TimerHandle | None = None
    seconds: float = 0.0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def log(self, message: str) -> None:
        now = datetime.now(UTC).isoformat()
        self.logs.append({"timestamp": now, "level": "INFO", "source": "USER", "message": message})
        self.notify()

    def become(self, status: Status) -> None:
        self.status = status
        self.notify()

    def notify(self) -> None:
        """Wakes all that wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self, seconds: float) -> None:
        """Returns at the next change, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)


class Kind(NamedTuple):
    """How an API runs its jobs.

    Attributes:
      work: makes the result from a job and the request's body.
      post: what the job's webhook is sent when it is over, from the job and the body.
      keeps_result: whether the result can be fetched later.
    """

    work: Callable[[Job, str], Awaitable[dict[str, Any]]]
    post: Callable[[Job, str], dict[str, Any]]
    keeps_result: bool = True


class _Delay(NamedTuple):
    """A job is to be run later, because its caller has asked for too much."""

    seconds: float


class Jobs:
    """Runs some jobs at a time: shares take turns, each with its jobs in their order.

    Of several slots one is kept for shares that have none.
    """

    def __init__(self, store: JobStore, webhooks: Webhooks, at_once: int, max_waiting: int):
        """Starts without jobs.

        Args:
          at_once: jobs that run at the same time.
          max_waiting: jobs of one share that can wait.
        """
        self._store = store
        self._webhooks = webhooks
        self._at_once = at_once
        self._max_waiting = max_waiting
        self._kinds: dict[str, Kind] = {}
        # The jobs that are not over, in their order.
        self._jobs: dict[str, Job] = {}
        # Those of them that can run now.
        self._queue: FairQueue[Job] = FairQueue()
        self._is_closing = False
        self._is_closed = False

    def register(self, name: str, kind: Kind) -> None:
        """Lets jobs be submitted as `name`."""
        self._kinds[name] = kind

    async def start(self) -> None:
        """Takes up what the last process left, jobs and webhooks."""
        for row in await self._store.unfinished():
            job = _as_job(row)
            job.log("taken up again after a restart of the server")
            self._jobs[job.id] = job
            self._queue.push(job, job.caller.share, job.caller.weight)
        await self._webhooks.start()
        self._advance()

    async def submit(self, caller: Caller, kind: str, body: str, webhook: str | None = None) -> Job:
        """Stores a job and puts it at the end of its share's queue.

        Args:
          body: the request, from which it can be run again.

        Raises:
          ApiError: too many jobs wait.
          QuotaError, StorageError: it cannot be stored.
        """
        self._check_room(caller)
        job = Job(str(uuid.uuid4()), caller, kind, webhook, is_stored=False)
        job.log(f"submitted by request {request_id()}")
        # It has its place while it is being stored.
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
        """Raises `ApiError` if this owner has none of that id."""
        job = self._jobs.get(job_id)
        if job is not None and job.caller.owner == owner:
            return job
        if job is None and (row := await self._store.find(job_id, owner)):
            return _as_job(row, Status.OVER)
        raise ApiError(404, f"there is no request {job_id[:80]!r}", code="not_found")

    def is_held(self, job: Job) -> bool:
        """Whether the job can still change."""
        return job.id in self._jobs

    def position(self, job: Job) -> int:
        """How many jobs of its share are before it in the queue."""
        queued = [each.id for each in self._queued if each.caller.share == job.caller.share]
        return queued.index(job.id) if job.id in queued else 0

    async def cancel(self, job: Job) -> bool:
        """Ends a job, whether it has begun or not; False if it is over or cancelled already."""
        if job.is_ending or job.status is Status.OVER or self._is_closed:
            return False
        if job.task is None:
            self._take_out(job)
            self._start_ending(job, _cancelled())
        else:
            job.is_ending = True
            job.task.cancel()
        await asyncio.wait({job.task}, timeout=_CANCEL_SECONDS)
        return True

    async def close(self, seconds: float) -> None:
        """Waits so long for jobs, and leaves the others to the next process, if there can be one.

        With a data directory only those that are running are waited for.
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
        """Whether what is not over is left to the next process."""
        return self._is_closing and self._store.is_durable

    @property
    def _begins_no_more(self) -> bool:
        return self._is_closed or self._leaves_jobs

    def _check_room(self, caller: Caller) -> None:
        waiting = [job.caller.share for job in self._jobs.values() if job.task is None]
        own = waiting.count(caller.share)
        if own >= self._max_waiting or len(waiting) >= _SHARES * self._max_waiting:
            message = f"{own} of your jobs are waiting, and {len(waiting)} of all"
            raise ApiError(429, message, code="queue_full", retry_after=10)

    def _advance(self) -> None:
        """Begins as many jobs as there are slots for."""
        while not self._begins_no_more and (free := self._at_once - self._queue.num_running) > 0:
            job = self._queue.pop(idle_only=free == 1 and self._at_once > 1)
            if job is None:
                return
            job.task = asyncio.create_task(self._run(job))
            job.task.add_done_callback(functools.partial(self._free_slot, job))

    def _free_slot(self, job: Job, task: asyncio.Task) -> None:
        """Goes on when a job has left its slot, whether it is over or not."""
        self._queue.finish(job.caller.share)
        is_over = not task.cancelled()
        delay = task.result() if is_over and task.exception() is None else None
        if job.is_ending and delay is not None:
            is_over = False
        if not is_over and not self._is_closed and (job.is_ending or not self._leaves_jobs):
            # Cancelled before its first step, or while it was put back.
            self._start_ending(job, _cancelled())
        elif delay is not None:
            self._delay(job, delay)
        else:
            self._forget(job, task)
        self._advance()

    def _delay(self, job: Job, delay: _Delay) -> None:
        """Lets a job wait without a slot, and be the next of its share after that."""
        job.task = None
        job.become(Status.QUEUED)
        if not self._is_closed:
            loop = asyncio.get_running_loop()
            job.timer = loop.call_later(delay.seconds, self._put_back, job)

    def _put_back(self, job: Job) -> None:
        job.timer = None
        self._queue.push_front(job, job.caller.share, job.caller.weight)
        self._advance()

    def _take_out(self, job: Job) -> None:
        """Lets a job that has no slot wait no longer."""
        if job.timer is not None:
            _stop_timer(job)
        elif job.is_stored:
            self._queue.remove(job)

    def _start_ending(self, job: Job, error: ApiError) -> None:
        """Ends a job that has no slot."""
        job.error, job.is_ending = error, True
        job.task = asyncio.create_task(self._end(job))
        job.task.add_done_callback(functools.partial(self._forget, job))

    def _forget(self, job: Job, task: asyncio.Task) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a job was interrupted until the next start", exc_info=error)
        self._jobs.pop(job.id, None)
        job.notify()

    async def _run(self, job: Job) -> _Delay | None:
        """Runs a job to its end, unless it is to be run later."""
        started = time.perf_counter()
        try:
            await self._store.begin(job.id)
            job.become(Status.RUNNING)
            job.result = await self._work(job)
            job.log("done")
        except asyncio.CancelledError:
            if self._leaves_jobs and not job.is_ending:
                await self._leave(job)
                return None
            job.error = _cancelled()
        except Exception as error:
            if (delay := _delay_after(job, error)) is not None:
                await self._leave(job)
                return delay
            job.error = as_api_error(error)
            job.log(str(job.error))
        job.seconds = time.perf_counter() - started
        await self._end(job)
        return None

    async def _work(self, job: Job) -> dict[str, Any]:
        if job.kind not in self._kinds:
            raise ApiError(500, f"jobs of kind {job.kind} are not run by this version")
        if job.attempts >= MAX_ATTEMPTS:
            raise ApiError(500, f"the server ended {job.attempts} times while it ran this job")
        return await self._kinds[job.kind].work(job, await self._store.body(job.id))

    async def _leave(self, job: Job) -> None:
        """Leaves a job as it was before this attempt, for later or for the next process."""
        with contextlib.suppress(StorageError):  # it is run again all the same
            await self._store.give_back(job.id)

    async def _end(self, job: Job) -> None:
        """Stores how a job ended, and what its webhook is sent, in one step."""
        job.is_ending = True
        try:
            delivery = await self._store_end(job)
        except QuotaError as error:
            job.result, job.error = None, as_api_error(error)
            delivery = await self._store_end(job)
        job.become(Status.OVER)
        if delivery is not None:
            self._webhooks.post(delivery)

    async def _store_end(self, job: Job) -> Delivery | None:
        """Raises `QuotaError` if what is to be posted is too much."""
        post = None if job.webhook is None else await self._post(job)
        if (kind := self._kinds.get(job.kind)) and not kind.keeps_result:
            job.result = None
        return await self._store.end(job.id, _outcome(job), post)

    async def _post(self, job: Job) -> bytes | None:
        if (kind := self._kinds.get(job.kind)) is None:
            return None
        body = await self._store.body(job.id)
        return await asyncio.to_thread(lambda: json.dumps(kind.post(job, body)).encode())


def _delay_after(job: Job, error: Exception) -> _Delay | None:
    """How long a job waits after an error that passes; None after another one."""
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


def _outcome(job: Job) -> Outcome:
    error = job.error and {
        "status": job.error.status,
        "message": str(job.error),
        "param": job.error.param,
        "code": job.error.code,
    }
    result = None if job.result is None else json.dumps(job.result)
    return Outcome(json.dumps(job.logs), job.seconds, result, error and json.dumps(error))


def _as_job(row: JobRow, status: Status = Status.QUEUED) -> Job:
    return Job(
        row.id,
        row.caller,
        row.kind,
        row.webhook,
        row.attempts,
        status,
        None if row.result is None else json.loads(row.result),
        None if row.error is None else ApiError(**json.loads(row.error)),
        json.loads(row.logs),
        seconds=row.seconds,
    )


def _cancelled() -> ApiError:
    return ApiError(400, "the request was cancelled", code="cancelled")
