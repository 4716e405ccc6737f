"""Webhooks: posts survive restarts, are limited per owner, and log no secrets."""

import asyncio
import logging

import pytest
from job_process import ANNA, BEN, SECRET, URL, Process, Receiver, over, until

from csm_jax.errors import InputError
from csm_jax.serve.errors import ApiError
from csm_jax.serve.jobs import webhooks
from csm_jax.serve.jobs.job import Job


def test_a_post_continues_after_a_restart_with_its_attempts_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(webhooks, "PAUSES", (0.01,) * 5)

    async def work() -> None:
        async with Process(tmp_path, receiver=Receiver(lambda: 500)) as first:
            job = await first.submit("a", url=URL)
            await until(lambda: len(first.receiver.posts) == 2)
        async with Process(tmp_path, receiver=Receiver(lambda: 500)) as second:
            await until(lambda: not second.webhooks._tasks)
        posts = first.receiver.posts + second.receiver.posts
        # An attempt that is interrupted by the end of the process is repeated.
        assert 6 <= len(posts) <= 7
        assert {headers["X-Webhook-Id"] for headers, _ in posts} == {job.id}
        assert len({body for _, body in posts}) == 1
        async with Process(tmp_path) as third:
            assert not third.webhooks._tasks

    asyncio.run(work())


def test_a_post_that_arrived_is_not_repeated(tmp_path):
    async def work() -> None:
        async with Process(tmp_path) as first:
            await first.submit("a", url=URL)
            await until(lambda: first.receiver.posts and not first.webhooks._tasks)
        async with Process(tmp_path) as second:
            await asyncio.sleep(0.1)
            assert second.receiver.posts == []

    asyncio.run(work())


def test_posts_wait_for_a_secret(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(webhooks, "PAUSES", (60.0,))

    async def work() -> None:
        async with Process(tmp_path, receiver=Receiver(lambda: 500)) as first:
            await first.submit("a", url=URL)
            await until(lambda: first.receiver.posts)
        without = Process(tmp_path)
        without.webhooks._secret = ""
        async with without:
            assert not without.webhooks._tasks
        monkeypatch.setattr(webhooks, "PAUSES", (0.0,))
        async with Process(tmp_path) as last:
            await until(lambda: last.receiver.posts)

    with caplog.at_level(logging.WARNING):
        asyncio.run(work())
    assert "CSM_JAX_WEBHOOK_SECRET" in caplog.text


def test_no_secret_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(webhooks, "PAUSES", ())

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


def test_pending_webhooks_of_one_owner_are_limited(monkeypatch):
    monkeypatch.setattr(webhooks, "_MAX_PENDING_OF_OWNER", 2)
    monkeypatch.setattr(webhooks, "PAUSES", (60.0,))

    async def work() -> None:
        async with Process(None, receiver=Receiver(lambda: 500)) as process:
            await over(process, *[await process.submit("a", url=URL) for _ in range(2)])
            with pytest.raises(ApiError) as refused:
                process.webhooks.check(URL, ANNA)
            assert refused.value.status == 429
            process.webhooks.check(URL, BEN)

    asyncio.run(work())


def test_posts_count_towards_the_storage_of_their_owner(monkeypatch):
    """A post that is too large is replaced by an error."""
    monkeypatch.setattr(webhooks, "PAUSES", (60.0,))

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
