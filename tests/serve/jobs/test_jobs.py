"""Jobs and webhooks: nothing is lost, whenever the process ends, and no owner sees another's."""

import asyncio
import json
import logging
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from csm_jax.errors import InputError
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import ApiError
from csm_jax.serve.jobs import runner as jobs
from csm_jax.serve.jobs import webhooks as webhook
from csm_jax.serve.jobs.runner import MAX_ATTEMPTS, Job, Jobs, Kind, Status
from csm_jax.serve.jobs.webhooks import Webhooks
from csm_jax.serve.settings import Limits
from csm_jax.serve.store import Store, database
from csm_jax.serve.store.errors import QuotaError, StorageError

ANNA, BEN = Caller("anna", "anna"), Caller("ben", "ben")
SECRET = "a secret"
URL = "http://127.0.0.1:9/done?token=hidden"


class Receiver:
    """Stands for `Outgoing`: keeps what is posted; `answer` gives the status or raises."""

    def __init__(self, answer: Callable[[], int] = lambda: 200):
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self._answer = answer

    async def post(self, url: str, body: bytes, headers: dict[str, str], share: str) -> int:
        self.posts.append((headers, body))
        return self._answer()


async def echo(job: Job, body: str) -> dict:
    return {"body": body}


class Process:
    """What of a server runs jobs, over a directory."""

    def __init__(
        self,
        directory: Path | None,
        work: Callable[[Job, str], Awaitable[dict]] = echo,
        receiver: Receiver | None = None,
        at_once: int = 2,
        max_waiting: int = 8,
        **limits: int,
    ):
        self.store = Store(directory, Limits(**limits))
        self.receiver = receiver or Receiver()
        self.webhooks = Webhooks(self.store.jobs, self.receiver, SECRET)
        self.jobs = Jobs(self.store.jobs, self.webhooks, at_once, max_waiting)
        self.jobs.register("echo", Kind(work, lambda job, body: {"id": job.id, **_said(job)}))

    async def __aenter__(self) -> "Process":
        await self.jobs.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.jobs.close(0)
        await self.webhooks.close(0)
        self.store.close()

    async def submit(self, body: str, caller: Caller = ANNA, url: str | None = None) -> Job:
        return await self.jobs.submit(caller, "echo", body, url)


def _said(job: Job) -> dict:
    return {"error": str(job.error)} if job.error else {"result": job.result}


async def over(process: Process, *jobs: Job) -> None:
    async with asyncio.timeout(10):
        for job in jobs:
            while (await process.jobs.find(job.id, job.caller.owner)).status is not Status.OVER:
                await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def block(job: Job, body: str) -> dict:
    await asyncio.Event().wait()
    return {}


def test_a_job_that_waits_or_runs_is_run_by_the_next_process(tmp_path):
    async def work() -> None:
        async with Process(tmp_path, block) as first:
            jobs = [await first.submit(f"{i}") for i in range(5)]
        async with Process(tmp_path) as second:
            await over(second, *jobs)
            for i, job in enumerate(jobs):
                found = await second.jobs.find(job.id, "anna")
                assert found.result == {"body": f"{i}"}
                assert "taken up again" in found.logs[1]["message"]
        async with Process(tmp_path, block) as third:
            assert (await third.jobs.find(jobs[0].id, "anna")).result == {"body": "0"}

    asyncio.run(work())


def test_without_a_directory_they_end_with_the_process():
    async def work() -> None:
        async with Process(None, block) as first:
            job = await first.submit("a")
            await until(lambda: job.status is Status.RUNNING)
        assert job.error.code == "cancelled"

    asyncio.run(work())


def test_a_job_that_ends_the_process_each_time_is_given_up(tmp_path):
    async def work() -> None:
        for _ in range(MAX_ATTEMPTS):
            process = Process(tmp_path, block)
            await process.jobs.start()
            job = next(iter(process.jobs._jobs.values()), None) or await process.submit("a")
            await until(lambda job=job: job.status is Status.RUNNING)
            # As with `kill -9`, nothing is written to the store.
            process.store.close()
            job.task.cancel()
            await asyncio.gather(job.task, return_exceptions=True)
        async with Process(tmp_path) as last:
            await over(last, job)
            found = await last.jobs.find(job.id, "anna")
            assert "ended 3 times" in str(found.error)

    asyncio.run(work())


def test_a_graceful_stop_counts_no_attempt(tmp_path):
    async def work() -> None:
        for _ in range(2 * MAX_ATTEMPTS):
            async with Process(tmp_path, block) as process:
                jobs = process.jobs._jobs
                job = next(iter(jobs.values()), None) or await process.submit("a")
                await until(lambda job=job: job.status is Status.RUNNING)
        async with Process(tmp_path) as last:
            await over(last, job)
            assert (await last.jobs.find(job.id, "anna")).result == {"body": "a"}

    asyncio.run(work())


def test_other_owners_find_no_job(tmp_path):
    async def work() -> None:
        for run in (echo, block):
            async with Process(None, run) as process:
                job = await process.submit("a")
                if run is echo:
                    await over(process, job)
                for owner in ("ben", "", "%", "ANNA"):
                    with pytest.raises(ApiError) as refused:
                        await process.jobs.find(job.id, owner)
                    assert refused.value.status == 404

    asyncio.run(work())


def test_a_cancelled_job_stays_cancelled(tmp_path):
    """Whether it ran or waited, and after a restart."""

    async def work() -> None:
        async with Process(tmp_path, block, at_once=1) as process:
            jobs = [await process.submit(f"{i}") for i in range(2)]
            await until(lambda: jobs[0].status is Status.RUNNING)
            for job in jobs[::-1]:
                assert await process.jobs.cancel(job)
                assert not await process.jobs.cancel(job)
        async with Process(tmp_path) as second:
            for job in jobs:
                assert (await second.jobs.find(job.id, "anna")).error.code == "cancelled"

    asyncio.run(work())


def test_cancelling_a_queued_job_twice_at_once_cancels_it(tmp_path):
    async def work() -> None:
        async with Process(tmp_path, block, at_once=1) as process:
            first = await process.submit("a")
            await until(lambda: first.status is Status.RUNNING)
            job = await process.submit("b")
            answers = await asyncio.gather(*[process.jobs.cancel(job) for _ in range(3)])
            assert answers == [True, False, False]
            assert (await process.jobs.find(job.id, "anna")).error.code == "cancelled"
        async with Process(tmp_path) as second:
            assert (await second.jobs.find(job.id, "anna")).error.code == "cancelled"

    asyncio.run(work())


def test_a_job_that_is_cancelled_before_its_first_step_stays_cancelled(tmp_path):
    async def work() -> None:
        async with Process(tmp_path, block, at_once=1) as process:
            job = await process.submit("a")
            # Its task has been made, and has not run.
            assert await process.jobs.cancel(job)
            await over(process, job)
            assert (await process.jobs.find(job.id, "anna")).error.code == "cancelled"
            assert process.jobs._queue.num_running == 0
        async with Process(tmp_path) as second:
            assert (await second.jobs.find(job.id, "anna")).error.code == "cancelled"

    asyncio.run(work())


def test_a_job_that_waits_for_its_quota_has_no_slot():
    """One share in debt does not hold up the others, nor more jobs of its own kind."""

    async def work_of(job: Job, body: str) -> dict:
        if job.caller is ANNA:
            raise ApiError(429, "in debt", code="rate_limited", retry_after=3600)
        return {}

    async def work() -> None:
        async with Process(None, work_of, at_once=1) as process:
            waiting = [await process.submit("a", ANNA) for _ in range(3)]
            await until(lambda: all(job.timer for job in waiting))
            assert [job.status for job in waiting] == [Status.QUEUED] * 3
            assert [process.jobs.position(job) for job in waiting] == [0, 1, 2]
            await over(process, await process.submit("b", BEN))
            assert await process.jobs.cancel(waiting[0])
            await over(process, waiting[0])
            assert waiting[0].timer is None

    asyncio.run(work())


def test_a_job_that_was_put_back_is_run_by_the_next_process(tmp_path):
    async def busy(job: Job, body: str) -> dict:
        raise ApiError(429, "in debt", code="rate_limited", retry_after=3600)

    async def work() -> None:
        for _ in range(MAX_ATTEMPTS + 1):
            async with Process(tmp_path, busy) as process:
                job = next(iter(process.jobs._jobs.values()), None) or await process.submit("a")
                await until(lambda job=job: job.timer)
        async with Process(tmp_path) as last:
            await over(last, job)
            assert (await last.jobs.find(job.id, "anna")).result == {"body": "a"}

    asyncio.run(work())


def test_a_job_is_put_back_a_limited_number_of_times():
    calls = []

    async def busy(job: Job, body: str) -> dict:
        calls.append(job)
        raise ApiError(429, "in debt", code="rate_limited", retry_after=0)

    async def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jobs, "_MAX_DELAYS", 1)
            async with Process(None, busy) as process:
                job = await process.submit("a")
                await over(process, job)
                assert (await process.jobs.find(job.id, "anna")).error.status == 429
        assert len(calls) == 2

    asyncio.run(work())


def test_long_jobs_of_one_share_leave_a_slot_for_others():
    async def long_for_anna(job: Job, body: str) -> dict:
        return await (block if job.caller is ANNA else echo)(job, body)

    async def work() -> None:
        async with Process(None, long_for_anna, at_once=3) as process:
            given = [await process.submit("a", ANNA) for _ in range(6)]
            await over(process, *[await process.submit("b", BEN) for _ in range(3)])
            assert sum(job.task is not None for job in given) == 2

    asyncio.run(work())


def test_nothing_is_begun_when_a_server_without_a_directory_has_closed():
    async def work() -> None:
        async with Process(None, block, at_once=1) as process:
            given = [await process.submit("a") for _ in range(3)]
            await until(lambda: given[0].status is Status.RUNNING)
        await asyncio.sleep(0.05)
        assert [job.task is None for job in given] == [False, True, True]

    asyncio.run(work())


def test_one_owner_cannot_take_all_places():
    async def work() -> None:
        async with Process(None, block, at_once=1, max_waiting=3) as process:
            for _ in range(4):
                await process.submit("a", ANNA)
            with pytest.raises(ApiError) as refused:
                await process.submit("a", ANNA)
            assert refused.value.status == 429
            await process.submit("a", BEN)

    asyncio.run(work())


def test_places_are_counted_while_jobs_are_being_stored():
    async def work() -> None:
        async with Process(None, block, at_once=1, max_waiting=3) as process:
            given = [process.submit("a") for _ in range(50)]
            answers = await asyncio.gather(*given, return_exceptions=True)
            assert sum(isinstance(answer, Job) for answer in answers) <= 4

    asyncio.run(work())


def test_shares_take_turns():
    async def work() -> None:
        order = []

        async def note(job: Job, body: str) -> dict:
            order.append(job.caller.owner)
            await asyncio.sleep(0.01)
            return {}

        async with Process(None, note, at_once=2) as process:
            jobs = [await process.submit("a", ANNA) for _ in range(8)]
            jobs += [await process.submit("a", BEN) for _ in range(3)]
            await over(process, *jobs)
        assert order.index("ben") < 5
        assert order[-3:] == ["anna"] * 3

    asyncio.run(work())


def test_requests_count_as_what_an_owner_stores():
    async def work() -> None:
        async with Process(None, block, at_once=1, stored_bytes_per_owner=1000) as process:
            await process.submit("a" * 900, ANNA)
            with pytest.raises(QuotaError):
                await process.submit("a" * 200, ANNA)
            await process.submit("a" * 200, BEN)

    asyncio.run(work())


def test_a_job_waits_while_its_caller_asks_for_too_much():
    async def work() -> None:
        answers = iter([ApiError(429, "busy", code="rate_limited", retry_after=0), None])

        async def busy(job: Job, body: str) -> dict:
            if error := next(answers):
                raise error
            return {"at": "last"}

        async with Process(None, busy) as process:
            job = await process.submit("a")
            await over(process, job)
            assert (await process.jobs.find(job.id, "anna")).result == {"at": "last"}

    asyncio.run(work())


@pytest.mark.parametrize("error", [ApiError(400, "no"), InputError("no"), RuntimeError("no")])
def test_a_failure_is_kept(tmp_path, error):
    async def fail(job: Job, body: str) -> dict:
        raise error

    async def work() -> None:
        async with Process(tmp_path, fail) as process:
            job = await process.submit("a", url=URL)
            await over(process, job)
            await until(lambda: process.receiver.posts)
        async with Process(tmp_path) as second:
            found = await second.jobs.find(job.id, "anna")
            assert found.error.status == (500 if isinstance(error, RuntimeError) else 400)
            assert second.receiver.posts == []

    asyncio.run(work())


# Webhooks.


def test_a_post_goes_on_after_a_restart_with_its_attempts_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(webhook, "PAUSES", (0.01,) * 5)

    async def work() -> None:
        async with Process(tmp_path, receiver=Receiver(lambda: 500)) as first:
            job = await first.submit("a", url=URL)
            await until(lambda: len(first.receiver.posts) == 2)
        async with Process(tmp_path, receiver=Receiver(lambda: 500)) as second:
            await until(lambda: not second.webhooks._tasks)
        posts = first.receiver.posts + second.receiver.posts
        # An attempt that the end of the process cuts off is made again.
        assert 6 <= len(posts) <= 7
        assert {headers["X-Webhook-Id"] for headers, _ in posts} == {job.id}
        assert len({body for _, body in posts}) == 1
        async with Process(tmp_path) as third:
            assert not third.webhooks._tasks

    asyncio.run(work())


def test_what_arrived_is_not_posted_again(tmp_path):
    async def work() -> None:
        async with Process(tmp_path) as first:
            await first.submit("a", url=URL)
            await until(lambda: first.receiver.posts and not first.webhooks._tasks)
        async with Process(tmp_path) as second:
            await asyncio.sleep(0.1)
            assert second.receiver.posts == []

    asyncio.run(work())


def test_posts_wait_for_a_secret(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(webhook, "PAUSES", (60.0,))

    async def work() -> None:
        async with Process(tmp_path, receiver=Receiver(lambda: 500)) as first:
            await first.submit("a", url=URL)
            await until(lambda: first.receiver.posts)
        without = Process(tmp_path)
        without.webhooks._secret = ""
        async with without:
            assert not without.webhooks._tasks
        monkeypatch.setattr(webhook, "PAUSES", (0.0,))
        async with Process(tmp_path) as last:
            await until(lambda: last.receiver.posts)

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    assert "CSM_JAX_WEBHOOK_SECRET" in caplog.text


def test_no_secret_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(webhook, "PAUSES", ())

    def refuse() -> int:
        raise InputError(f"{URL}: cannot be reached")

    async def work() -> None:
        async with Process(None, receiver=Receiver(refuse)) as process:
            await process.submit("a", url=URL)
            await until(lambda: process.receiver.posts and not process.webhooks._tasks)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(work())
    assert "given up after 1 attempts: 127.0.0.1" in caplog.text
    assert "hidden" not in caplog.text
    assert SECRET not in caplog.text


def test_one_owner_cannot_take_all_webhooks(monkeypatch):
    monkeypatch.setattr(webhook, "_MAX_PENDING_OF_OWNER", 2)
    monkeypatch.setattr(webhook, "PAUSES", (60.0,))

    async def work() -> None:
        async with Process(None, receiver=Receiver(lambda: 500)) as process:
            await over(process, *[await process.submit("a", url=URL) for _ in range(2)])
            with pytest.raises(ApiError) as refused:
                process.webhooks.check(URL, ANNA)
            assert refused.value.status == 429
            process.webhooks.check(URL, BEN)

    asyncio.run(work())


def test_a_post_counts_as_what_its_owner_stores(monkeypatch):
    """One that is too large is replaced by the news that it is."""
    monkeypatch.setattr(webhook, "PAUSES", (60.0,))

    async def long(job: Job, body: str) -> dict:
        return {"audio": "x" * 60_000}

    async def work() -> None:
        receiver = Receiver(lambda: 500)
        async with Process(None, long, receiver, stored_bytes_per_owner=200_000) as process:
            given = [await process.submit("a", url=URL) for _ in range(5)]
            await over(process, *given)
            found = [await process.jobs.find(job.id, "anna") for job in given]
            errors = [job.error for job in found if job.error]
            assert errors
            assert {error.code for error in errors} == {"storage_full"}
            await until(lambda: len(receiver.posts) == len(given))
        sizes = sorted(len(body) for _, body in receiver.posts)
        assert sum(sizes) < 200_000
        assert sizes[0] < 1000

    asyncio.run(work())


def test_a_job_waits_until_its_request_can_be_read(monkeypatch):
    monkeypatch.setattr(database, "FIRST_PAUSE", 0.01)

    async def work() -> None:
        async with Process(None, block) as process:
            job = await process.submit("a", url=URL)
            await until(lambda: job.status is Status.RUNNING)
            run, failures = process.store.database.run, iter([True, True])

            async def fail(query, *arguments):
                if query.__name__ == "read" and next(failures, False):
                    raise StorageError("the disk fails")
                return await run(query, *arguments)

            monkeypatch.setattr(process.store.database, "run", fail)
            assert await process.jobs.cancel(job)
            assert (await process.jobs.find(job.id, "anna")).error.code == "cancelled"
            assert next(failures, None) is None

    asyncio.run(work())


# A process that is killed.

KILLED = """
    import asyncio, sys
    from pathlib import Path
    from test_jobs import ANNA, URL, Process

    async def slowly(job, body):
        await asyncio.sleep(0.03)
        return {"body": body}

    async def main():
        async with Process(Path(sys.argv[1]), slowly, max_waiting=100) as process:
            for i in range(30):
                job = await process.submit(str(i), url=URL)
                print(job.id, flush=True)
            await asyncio.sleep(60)

    asyncio.run(main())
"""


@pytest.mark.parametrize("count", [1, 12, 30])
def test_kill_9_loses_no_job_that_was_acknowledged(tmp_path, count):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    where = Path(__file__).parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=where) as process:
        names = [process.stdout.readline().strip() for _ in range(count)]
        process.send_signal(signal.SIGKILL)
    assert all(names)

    async def work() -> None:
        async with Process(tmp_path) as second:
            jobs = [Job(name, ANNA, "echo") for name in names]
            await over(second, *jobs)
            for i, name in enumerate(names):
                assert (await second.jobs.find(name, "anna")).result == {"body": str(i)}
            await until(lambda: not second.webhooks._tasks)
            posted = [json.loads(body) for _, body in second.receiver.posts]
            # What was posted before the end of the first process is not known here.
            assert len({each["id"] for each in posted}) == len(posted)
            rows = await second.store.jobs.deliveries()
            assert rows == []

    asyncio.run(work())
