"""Work that goes on without its client: asked for, looked at, fetched or cancelled later."""

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from csm_jax.serve.caller import Caller
from csm_jax.serve.errors import ApiError, as_api_error
from csm_jax.serve.middleware.log import request_id

Work = Callable[["Job"], Coroutine[Any, Any, dict]]


class Status(Enum):
    QUEUED = "IN_QUEUE"
    RUNNING = "IN_PROGRESS"
    OVER = "COMPLETED"


@dataclass
class Job:
    """Attributes:
    owner: whose it is; nobody else finds it.
    result, error: one of them, when it is over.
    logs: what has been said of it so far, with times.
    """

    id: str
    owner: str
    status: Status = Status.QUEUED
    result: dict | None = None
    error: ApiError | None = None
    logs: list[dict[str, str]] = field(default_factory=list)
    task: asyncio.Task | None = None
    seconds: float = 0.0

    def log(self, message: str) -> None:
        now = datetime.now(UTC).isoformat()
        self.logs.append({"timestamp": now, "level": "INFO", "source": "USER", "message": message})


class Jobs:
    """Runs some at a time, and remembers the results of the youngest."""

    def __init__(self, at_once: int, max_waiting: int, max_kept: int = 1000):
        self._at_once = asyncio.Semaphore(at_once)
        self._max_waiting = max_waiting
        self._max_kept = max_kept
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def submit(
        self, caller: Caller, work: Work, tell: Callable[[Job], None] = lambda job: None
    ) -> Job:
        """Puts work at the end of the queue.

        Args:
          tell: called with the job when it is over.

        Raises:
          ApiError: too much waits.
        """
        waiting = sum(job.status is Status.QUEUED for job in self._jobs.values())
        if waiting >= self._max_waiting:
            message = f"{waiting} jobs are waiting"
            raise ApiError(429, message, code="queue_full", retry_after=10)
        job = Job(str(uuid.uuid4()), caller.owner)
        job.log(f"submitted by request {request_id()}")
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._run(job, work, tell))
        self._forget()
        return job

    def find(self, job_id: str, owner: str) -> Job:
        """Raises `ApiError` if this owner has none of that id."""
        if job_id not in self._jobs or self._jobs[job_id].owner != owner:
            raise ApiError(404, f"there is no request {job_id[:80]!r}", code="not_found")
        return self._jobs[job_id]

    def position(self, job: Job) -> int:
        """How many are before it in the queue."""
        queued = [each.id for each in self._jobs.values() if each.status is Status.QUEUED]
        return queued.index(job.id) if job.id in queued else 0

    def cancel(self, job: Job) -> None:
        """Ends it, whether it has begun or not."""
        if job.status is not Status.OVER:
            job.status, job.error = Status.OVER, _cancelled()
            job.task.cancel()

    async def close(self, seconds: float) -> None:
        """Waits so long for those that are not over, and gives up the others."""
        tasks = [job.task for job in self._jobs.values() if not job.task.done()]
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)
        for job in list(self._jobs.values()):
            self.cancel(job)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: Job, work: Work, tell: Callable[[Job], None]) -> None:
        try:
            async with self._at_once:
                job.status = Status.RUNNING
                started = time.perf_counter()
                job.result = await work(job)
                job.seconds = time.perf_counter() - started
                job.log("done")
        except asyncio.CancelledError:
            job.error = _cancelled()
        except Exception as error:
            job.error = as_api_error(error)
            job.log(str(job.error))
        job.status = Status.OVER
        tell(job)

    def _forget(self) -> None:
        over = [job.id for job in self._jobs.values() if job.status is Status.OVER]
        for job_id in over[: max(0, len(over) - self._max_kept)]:
            del self._jobs[job_id]


def _cancelled() -> ApiError:
    return ApiError(400, "the request was cancelled", code="cancelled")
