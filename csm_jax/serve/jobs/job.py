"""A job, and how an API runs the jobs of its kind."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any, NamedTuple

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import ApiError
from csm_jax.serve.store.jobs import JobRow, Outcome


class Status(Enum):
    """The state of a job, in the words of fal's API."""

    QUEUED = "IN_QUEUE"
    RUNNING = "IN_PROGRESS"
    COMPLETED = "COMPLETED"


@dataclass(eq=False)
class Job:
    """A request that runs without its client.

    Attributes:
      caller: owns the job; other owners cannot find it.
      kind: names its `JobHandler`.
      attempts: how often a process has begun to run it, and was killed.
      result, error: one of them is set when the job is completed.
      logs: progress messages with their times.
      task: runs the job; None while it waits.
      is_stored: it is in the store, so it can be run.
      is_ending: it was cancelled, or its outcome is known and is being stored.
      num_delays: how often it was delayed after an error that passes.
      timer: ends the current delay.
      seconds: how long it ran.
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

    def set_status(self, status: Status) -> None:
        self.status = status
        self.notify()

    def notify(self) -> None:
        """Wakes all tasks that wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, seconds: float) -> None:
        """Returns at the next change, at the latest after so many seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)


class JobHandler(NamedTuple):
    """How an API runs its jobs.

    Attributes:
      run: makes the result, from the job and the body of its request.
      webhook_body: makes the body that is posted to the job's webhook, from the same.
      keeps_result: whether the result can be fetched later.
    """

    run: Callable[[Job, str], Awaitable[dict[str, Any]]]
    webhook_body: Callable[[Job, str], dict[str, Any]]
    keeps_result: bool = True


def outcome_of(job: Job) -> Outcome:
    """The outcome of a completed job, as it is stored."""
    result = None if job.result is None else json.dumps(job.result)
    error = None if job.error is None else json.dumps(_stored_error(job.error))
    return Outcome(json.dumps(job.logs), job.seconds, result, error)


def _stored_error(error: ApiError) -> dict[str, Any]:
    return {
        "status": error.status,
        "message": str(error),
        "param": error.param,
        "code": error.code,
    }


def job_from_row(row: JobRow, status: Status = Status.QUEUED) -> Job:
    """The job of a stored row."""
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


def cancelled_error() -> ApiError:
    """The error of a job that was cancelled."""
    return ApiError(400, "the request was cancelled", code="cancelled")
