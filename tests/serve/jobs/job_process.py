"""The parts of a server that run jobs, with a fake receiver of webhooks."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.jobs.job import Job, JobHandler, Status
from csm_jax.serve.jobs.runner import JobRunner
from csm_jax.serve.jobs.webhooks import Webhooks
from csm_jax.serve.settings import Limits
from csm_jax.serve.store import Store

ANNA, BEN = Caller("anna", "anna"), Caller("ben", "ben")
SECRET = "a secret"
URL = "http://127.0.0.1:9/done?token=hidden"


class Receiver:
    """A fake `OutboundHTTP`, which records posts; `answer` returns the status or raises."""

    def __init__(self, answer: Callable[[], int] = lambda: 200):
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self._answer = answer

    async def post(self, url: str, body: bytes, headers: dict[str, str], share: str) -> int:
        self.posts.append((headers, body))
        return self._answer()


async def echo(job: Job, body: str) -> dict:
    return {"body": body}


class Process:
    """The parts of a server that run jobs, with a store in a directory."""

    def __init__(
        self,
        directory: Path | None,
        work: Callable[[Job, str], Awaitable[dict]] = echo,
        receiver: Receiver | None = None,
        max_running: int = 2,
        max_waiting: int = 8,
        **limits: int,
    ):
        self.store = Store(directory, Limits(**limits))
        self.receiver = receiver or Receiver()
        self.webhooks = Webhooks(self.store.jobs, self.receiver, SECRET)
        self.jobs = JobRunner(self.store.jobs, self.webhooks, max_running, max_waiting)
        self.jobs.register(
            "echo", JobHandler(work, lambda job, body: {"id": job.id, **_outcome(job)})
        )

    async def __aenter__(self) -> "Process":
        await self.jobs.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.jobs.close(0)
        await self.webhooks.close(0)
        self.store.close()

    async def submit(self, body: str, caller: Caller = ANNA, url: str | None = None) -> Job:
        return await self.jobs.submit(caller, "echo", body, url)


def _outcome(job: Job) -> dict:
    return {"error": str(job.error)} if job.error else {"result": job.result}


async def over(process: Process, *jobs: Job) -> None:
    async with asyncio.timeout(10):
        for job in jobs:
            while (
                await process.jobs.find(job.id, job.caller.owner)
            ).status is not Status.COMPLETED:
                await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def block(job: Job, body: str) -> dict:
    await asyncio.Event().wait()
    return {}
