"""Jobs, their results, and pending posts to webhooks."""

import sqlite3
from typing import Any, NamedTuple

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.store.database import Database
from csm_jax.serve.store.quota import Quota

# Posts up to this size, such as reports of failures, are stored even beyond an owner's limit.
_SMALL_POST = 10_000
# How long results are kept, and how many of one owner.
KEPT_SECONDS = 3600.0
_KEPT_OF_OWNER = 1000


class JobRow(NamedTuple):
    """A job as it is stored.

    Attributes:
      attempts: how often a process has begun to run it, and was killed.
      logs: JSON.
      error: JSON: status, message, param and code; None if there is none.
      result: JSON; None if it is not completed, or failed.
    """

    id: str
    caller: Caller
    kind: str
    webhook: str | None
    attempts: int
    seconds: float
    logs: str
    error: str | None
    result: str | None


class Outcome(NamedTuple):
    """The outcome of a job; the fields are those of `JobRow`."""

    logs: str
    seconds: float
    result: str | None = None
    error: str | None = None


class Delivery(NamedTuple):
    """A pending post to a webhook; `id` is that of the job."""

    id: str
    owner: str
    url: str
    attempts: int


class JobStore:
    """The unfinished jobs of a server, and the results of finished ones."""

    def __init__(self, database: Database, quota: Quota):
        self._database = database
        self._quota = quota

    @property
    def is_durable(self) -> bool:
        """Whether jobs outlive the process."""
        return self._database.is_durable

    async def add(
        self, job_id: str, caller: Caller, kind: str, body: str, webhook: str | None, logs: str
    ) -> None:
        """Stores a job. Raises `QuotaError`."""
        await self._database.run(self._add, job_id, caller, kind, body, webhook, logs)

    async def unfinished(self) -> list[JobRow]:
        """All unfinished jobs, oldest first."""

        def read(connection: sqlite3.Connection) -> list[JobRow]:
            rows = connection.execute(_JOB + "WHERE until IS NULL ORDER BY rowid")
            return [_row(row) for row in rows]

        return await self._database.run(read)

    async def begin(self, job_id: str) -> None:
        """Counts an attempt."""

        def begin(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE jobs SET attempts = attempts + 1 WHERE id = ?", (job_id,))

        await self._database.persist(begin)

    async def body(self, job_id: str) -> str:
        """The request of an unfinished job; tried again until it can be read."""

        def read(connection: sqlite3.Connection) -> str:
            return connection.execute("SELECT body FROM jobs WHERE id = ?", (job_id,)).fetchone()[0]

        return await self._database.persist(read)

    async def give_back(self, job_id: str) -> None:
        """Takes back an attempt that was interrupted by the end of the server, or delayed."""

        def give_back(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE jobs SET attempts = attempts - 1 WHERE id = ?", (job_id,))

        await self._database.run(give_back)

    async def end(self, job_id: str, outcome: Outcome, post: bytes | None) -> Delivery | None:
        """Stores the outcome of a job together with the post to its webhook.

        Raises:
          QuotaError: the post is too large for its owner's limit; then nothing is stored.
        """
        until = self._database.now() + KEPT_SECONDS
        return await self._database.persist(self._end, job_id, outcome, post, until)

    async def find(self, job_id: str, owner: str) -> JobRow | None:
        """A finished job, as long as its result is kept."""

        def find(connection: sqlite3.Connection, now: float) -> JobRow | None:
            found = connection.execute(
                _JOB + "WHERE id = ? AND owner = ? AND until > ?", (job_id, owner, now)
            ).fetchone()
            return found and _row(found)

        return await self._database.run(find, self._database.now())

    async def expire(self) -> None:
        """Removes results that are expired, or beyond the number for an owner."""

        def expire(connection: sqlite3.Connection, now: float) -> None:
            connection.execute("DELETE FROM jobs WHERE until <= ?", (now,))
            connection.execute(
                "DELETE FROM jobs WHERE id IN (SELECT id FROM (SELECT id, ROW_NUMBER() OVER "
                "(PARTITION BY owner ORDER BY until DESC) AS place FROM jobs "
                "WHERE until IS NOT NULL) WHERE place > ?)",
                (_KEPT_OF_OWNER,),
            )

        await self._database.free(expire, self._database.now())

    async def deliveries(self) -> list[Delivery]:
        """All pending posts, oldest first."""

        def read(connection: sqlite3.Connection) -> list[Delivery]:
            query = "SELECT id, owner, url, attempts FROM deliveries ORDER BY rowid"
            return [Delivery(*row) for row in connection.execute(query)]

        return await self._database.run(read)

    async def read_post(self, delivery: Delivery) -> bytes:
        """The body of a post."""

        def read(connection: sqlite3.Connection) -> bytes:
            query = "SELECT body FROM deliveries WHERE id = ?"
            return connection.execute(query, (delivery.id,)).fetchone()[0]

        return await self._database.run(read)

    async def count_attempt(self, delivery: Delivery) -> None:
        """Counts an attempt at a post."""

        def count(connection: sqlite3.Connection) -> None:
            query = "UPDATE deliveries SET attempts = attempts + 1 WHERE id = ?"
            connection.execute(query, (delivery.id,))

        await self._database.persist(count)

    async def forget(self, delivery: Delivery) -> None:
        """Removes a post that has arrived, or was given up."""

        def forget(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM deliveries WHERE id = ?", (delivery.id,))

        await self._database.persist(forget)

    def _add(
        self,
        connection: sqlite3.Connection,
        job_id: str,
        caller: Caller,
        kind: str,
        body: str,
        webhook: str | None,
        logs: str,
    ) -> None:
        size = len(body.encode())
        self._quota.check_bytes(connection, caller.owner, size)
        connection.execute(
            "INSERT INTO jobs (id, owner, share, weight, kind, webhook, logs, num_bytes, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (job_id, caller.owner, caller.share, caller.weight, kind, webhook, logs, size, body),
        )

    def _end(
        self,
        connection: sqlite3.Connection,
        job_id: str,
        outcome: Outcome,
        post: bytes | None,
        until: float,
    ) -> Delivery | None:
        size = len(outcome.logs.encode()) + len((outcome.result or "").encode())
        ended = connection.execute(
            "UPDATE jobs SET logs = ?, seconds = ?, result = ?, error = ?, until = ?, "
            "num_bytes = ?, body = NULL WHERE id = ? AND until IS NULL RETURNING owner, webhook",
            (*outcome, until, size, job_id),
        ).fetchone()
        if ended is None or post is None or ended[1] is None:
            return None
        owner, url = ended
        if len(post) > _SMALL_POST:
            self._quota.check_bytes(connection, owner, len(post))
        connection.execute(
            "INSERT OR IGNORE INTO deliveries VALUES (?, ?, ?, 0, ?, ?)",
            (job_id, owner, url, len(post), post),
        )
        return Delivery(job_id, owner, url, 0)


_JOB = (
    "SELECT id, owner, share, weight, kind, webhook, attempts, seconds, logs, error, result "
    "FROM jobs "
)


def _row(row: tuple[Any, ...]) -> JobRow:
    job_id, owner, share, weight, *rest = row
    return JobRow(job_id, Caller(owner, share, weight), *rest)
