"""Jobs: restarts lose nothing, and owners cannot see each other's jobs."""

import asyncio
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from job_process import ANNA, BEN, URL, Process, block, echo, over, until

from csm_jax.errors import InputError
from csm_jax.serve.errors import ApiError, QuotaError, StorageError
from csm_jax.serve.jobs import runner
from csm_jax.serve.jobs.job import Job, Status
from csm_jax.serve.jobs.runner import MAX_ATTEMPTS
from csm_jax.serve.store import database


def test_unfinished_jobs_run_again_in_the_next_process(tmp_path):
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


def test_jobs_without_a_directory_end_with_the_process():
    async def work() -> None:
        async with Process(None, block) as first:
            job = await first.submit("a")
            await until(lambda: job.status is Status.RUNNING)
        assert job.error.code == "cancelled"

    asyncio.run(work())


def test_a_job_that_kills_the_process_repeatedly_fails(tmp_path):
    async def work() -> None:
        for _ in range(MAX_ATTEMPTS):
            process = Process(tmp_path, block)
            await process.jobs.start()
            job = next(iter(process.jobs._jobs.values()), None) or await process.submit("a")
            await until(lambda job=job: job.status is Status.RUNNING)
            # Nothing is written to the store, as after `kill -9`.
            process.store.close()
            job.task.cancel()
            await asyncio.gather(job.task, return_exceptions=True)
        async with Process(tmp_path) as last:
            await over(last, job)
            found = await last.jobs.find(job.id, "anna")
            assert "ended 3 times" in str(found.error)

    asyncio.run(work())


def test_a_graceful_stop_does_not_count_as_an_attempt(tmp_path):
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


def test_other_owners_cannot_find_a_job(tmp_path):
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
    """Whether it was running or waiting, and after a restart."""

    async def work() -> None:
        async with Process(tmp_path, block, max_running=1) as process:
            jobs = [await process.submit(f"{i}") for i in range(2)]
            await until(lambda: jobs[0].status is Status.RUNNING)
            for job in jobs[::-1]:
                assert await process.jobs.cancel(job)
                assert not await process.jobs.cancel(job)
        async with Process(tmp_path) as second:
            for job in jobs:
                assert (await second.jobs.find(job.id, "anna")).error.code == "cancelled"

    asyncio.run(work())


def test_cancelling_a_queued_job_several_times_at_once_cancels_it_once(tmp_path):
    async def work() -> None:
        async with Process(tmp_path, block, max_running=1) as process:
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
        async with Process(tmp_path, block, max_running=1) as process:
            job = await process.submit("a")
            # Its task exists, but has not run yet.
            assert await process.jobs.cancel(job)
            await over(process, job)
            assert (await process.jobs.find(job.id, "anna")).error.code == "cancelled"
            assert process.jobs._queue.num_running == 0
        async with Process(tmp_path) as second:
            assert (await second.jobs.find(job.id, "anna")).error.code == "cancelled"

    asyncio.run(work())


def test_a_delayed_job_has_no_slot():
    """A share over its limit delays neither other shares nor other jobs of its kind."""

    async def work_of(job: Job, body: str) -> dict:
        if job.caller is ANNA:
            raise ApiError(429, "in debt", code="rate_limited", retry_after=3600)
        return {}

    async def work() -> None:
        async with Process(None, work_of, max_running=1) as process:
            waiting = [await process.submit("a", ANNA) for _ in range(3)]
            await until(lambda: all(job.timer for job in waiting))
            assert [job.status for job in waiting] == [Status.QUEUED] * 3
            assert [process.jobs.position(job) for job in waiting] == [0, 1, 2]
            await over(process, await process.submit("b", BEN))
            assert await process.jobs.cancel(waiting[0])
            await over(process, waiting[0])
            assert waiting[0].timer is None

    asyncio.run(work())


def test_a_delayed_job_runs_in_the_next_process(tmp_path):
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


def test_the_number_of_delays_is_limited():
    calls = []

    async def busy(job: Job, body: str) -> dict:
        calls.append(job)
        raise ApiError(429, "in debt", code="rate_limited", retry_after=0)

    async def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "_MAX_DELAYS", 1)
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
        async with Process(None, long_for_anna, max_running=3) as process:
            given = [await process.submit("a", ANNA) for _ in range(6)]
            await over(process, *[await process.submit("b", BEN) for _ in range(3)])
            assert sum(job.task is not None for job in given) == 2

    asyncio.run(work())


def test_no_job_starts_after_a_server_without_a_directory_has_closed():
    async def work() -> None:
        async with Process(None, block, max_running=1) as process:
            given = [await process.submit("a") for _ in range(3)]
            await until(lambda: given[0].status is Status.RUNNING)
        await asyncio.sleep(0.05)
        assert [job.task is None for job in given] == [False, True, True]

    asyncio.run(work())


def test_one_owner_cannot_fill_the_queue():
    async def work() -> None:
        async with Process(None, block, max_running=1, max_waiting=3) as process:
            for _ in range(4):
                await process.submit("a", ANNA)
            with pytest.raises(ApiError) as refused:
                await process.submit("a", ANNA)
            assert refused.value.status == 429
            await process.submit("a", BEN)

    asyncio.run(work())


def test_jobs_count_as_waiting_while_they_are_being_stored():
    async def work() -> None:
        async with Process(None, block, max_running=1, max_waiting=3) as process:
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

        async with Process(None, note, max_running=2) as process:
            jobs = [await process.submit("a", ANNA) for _ in range(8)]
            jobs += [await process.submit("a", BEN) for _ in range(3)]
            await over(process, *jobs)
        assert order.index("ben") < 5
        assert order[-3:] == ["anna"] * 3

    asyncio.run(work())


def test_job_requests_count_towards_the_storage_of_their_owner():
    async def work() -> None:
        async with Process(None, block, max_running=1, stored_bytes_per_owner=1000) as process:
            await process.submit("a" * 900, ANNA)
            with pytest.raises(QuotaError):
                await process.submit("a" * 200, ANNA)
            await process.submit("a" * 200, BEN)

    asyncio.run(work())


def test_a_job_is_delayed_while_its_caller_is_over_a_limit():
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
def test_the_error_of_a_failed_job_is_stored(tmp_path, error):
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
    from job_process import ANNA, URL, Process

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
def test_kill_9_loses_no_acknowledged_job(tmp_path, count):
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
            # Jobs whose names were not read yet are run as well, and posted.
            await until(lambda: not second.jobs._jobs and not second.webhooks._tasks)
            posted = [json.loads(body) for _, body in second.receiver.posts]
            # Posts of the first process are not recorded here.
            assert len({each["id"] for each in posted}) == len(posted)
            rows = await second.store.jobs.deliveries()
            assert rows == []

    asyncio.run(work())
