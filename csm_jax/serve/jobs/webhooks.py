"""Webhooks: results of jobs are posted to URLs of the requests, signed, in several attempts.

A post is stored with the outcome of its job, so it arrives at least once, even after a restart. The
header `X-Webhook-Id` is the same in all attempts, so that a receiver can recognize repetitions.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections import Counter, defaultdict
from urllib.parse import urlsplit

from csm_jax.errors import InputError
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import ApiError, StorageError
from csm_jax.serve.network.outbound_http import OutboundHTTP, check_url
from csm_jax.serve.store.jobs import Delivery, JobStore

logger = logging.getLogger("csm_jax.serve")

# Seconds between attempts.
PAUSES = (1.0, 5.0, 30.0, 120.0)
# Posts that may wait, of one owner and in total.
_MAX_PENDING_OF_OWNER = 100
_MAX_PENDING = 1000
# Concurrent posts of one owner: a slow receiver must not delay those of other owners.
_MAX_CONCURRENT = 4


class Webhooks:
    """Posts results in the background."""

    def __init__(self, store: JobStore, outbound_http: OutboundHTTP, secret: str):
        """Starts without posts.

        Args:
          secret: signs the bodies; without it webhooks are refused.
        """
        self._store = store
        self._outbound_http = outbound_http
        self._secret = secret
        self._tasks: set[asyncio.Task] = set()
        self._pending: Counter[str] = Counter()
        self._slots: dict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(_MAX_CONCURRENT)
        )

    def check(self, url: str, caller: Caller) -> None:
        """Raises `ApiError` or `InputError` if a result could not be posted to `url`."""
        if not self._secret:
            message = "webhooks are off: start the server with CSM_JAX_WEBHOOK_SECRET"
            raise ApiError(400, message, param="webhook", code="webhooks_off")
        check_url(url)
        own, every = self._pending[caller.owner], self._pending.total()
        if own >= _MAX_PENDING_OF_OWNER or every >= _MAX_PENDING:
            raise ApiError(429, "too many webhooks wait", code="queue_full", retry_after=10)

    async def start(self) -> None:
        """Continues with the posts that the last process left."""
        waiting = await self._store.deliveries()
        if waiting and not self._secret:
            logger.warning("%d webhooks wait for a start with CSM_JAX_WEBHOOK_SECRET", len(waiting))
            return
        for delivery in waiting:
            self.post(delivery)

    def post(self, delivery: Delivery) -> None:
        """Starts to post a stored result."""
        task = asyncio.create_task(self._post(delivery))
        self._tasks.add(task)
        self._pending[delivery.owner] += 1
        task.add_done_callback(lambda task: self._done(task, delivery.owner))

    async def close(self, seconds: float) -> None:
        """Waits for the current posts for so many seconds; the next process sends the others."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task, owner: str) -> None:
        self._tasks.discard(task)
        self._pending[owner] -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a webhook was interrupted until the next start", exc_info=error)

    async def _post(self, delivery: Delivery) -> None:
        pauses = (0.0, *PAUSES)
        reason = "no attempt is left"
        for pause in pauses[delivery.attempts :]:
            await asyncio.sleep(pause)
            async with self._slots[delivery.owner]:
                reason = await self._try(delivery)
            if reason is None:
                break
            # Counted after the attempt, so that an interrupted one is repeated after a restart.
            await self._store.count_attempt(delivery)
        if reason is not None:
            logger.warning("a webhook was given up after %d attempts: %s", len(pauses), reason)
        await self._store.forget(delivery)

    async def _try(self, delivery: Delivery) -> str | None:
        """Posts once; returns why it failed, without the URL, which may contain a secret."""
        try:
            body = await self._store.read_post(delivery)
            headers = {"X-Webhook-Id": delivery.id, **signature(self._secret, body)}
            status = await self._outbound_http.post(delivery.url, body, headers, delivery.owner)
        except StorageError as error:
            return str(error)
        except InputError as error:
            return str(error).replace(delivery.url[:200], str(urlsplit(delivery.url).hostname))
        return None if status < 300 else f"status {status}"


def signature(secret: str, body: bytes) -> dict[str, str]:
    """Headers that prove the sender and the time of a body, so that replays can be detected."""
    timestamp = str(int(time.time()))
    signed = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return {
        "X-Webhook-Timestamp": timestamp,
        "X-Webhook-Signature": f"sha256={signed.hexdigest()}",
    }
