"""Results that are posted to an address that the request named, signed, and tried several times.

A post is stored with the end of its job, so it arrives at least once, also after a restart. The
header `X-Webhook-Id` is the same in all attempts, so that a receiver can tell them from new ones.
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
from csm_jax.serve.errors import ApiError
from csm_jax.serve.network.outbound_http import Outgoing, check_url
from csm_jax.serve.store.errors import StorageError
from csm_jax.serve.store.jobs import Delivery, JobStore

logger = logging.getLogger("csm_jax.serve")

# Seconds between attempts.
PAUSES = (1.0, 5.0, 30.0, 120.0)
# Posts that can wait, of one owner and of all.
_MAX_PENDING_OF_OWNER = 100
_MAX_PENDING = 1000
# Posts of one owner that are under way at once: a slow receiver must not hold up the others.
_AT_ONCE = 4


class Webhooks:
    """Posts results in the background."""

    def __init__(self, store: JobStore, outgoing: Outgoing, secret: str):
        """Starts without anything to post.

        Args:
          secret: signs the bodies; without one nothing is posted.
        """
        self._store = store
        self._outgoing = outgoing
        self._secret = secret
        self._tasks: set[asyncio.Task] = set()
        self._pending: Counter[str] = Counter()
        self._turns: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(_AT_ONCE))

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
        """Goes on with what the last process had not posted."""
        waiting = await self._store.deliveries()
        if waiting and not self._secret:
            logger.warning("%d webhooks wait for a start with CSM_JAX_WEBHOOK_SECRET", len(waiting))
            return
        for delivery in waiting:
            self.post(delivery)

    def post(self, delivery: Delivery) -> None:
        """Begins to post a result that is stored."""
        task = asyncio.create_task(self._post(delivery))
        self._tasks.add(task)
        self._pending[delivery.owner] += 1
        task.add_done_callback(lambda task: self._done(task, delivery.owner))

    async def close(self, seconds: float) -> None:
        """Waits a little for those under way, and leaves the others to the next process."""
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
            async with self._turns[delivery.owner]:
                reason = await self._try(delivery)
            if reason is None:
                break
            # Counted behind the attempt: one that is cut off by the end of the process is made
            # again.
            await self._store.count_attempt(delivery)
        if reason is not None:
            logger.warning("a webhook was given up after %d attempts: %s", len(pauses), reason)
        await self._store.forget(delivery)

    async def _try(self, delivery: Delivery) -> str | None:
        """Posts once; returns why it failed, without the address, which may hold a secret."""
        try:
            body = await self._store.read_post(delivery)
            headers = {"X-Webhook-Id": delivery.id, **signature(self._secret, body)}
            status = await self._outgoing.post(delivery.url, body, headers, delivery.owner)
        except StorageError as error:
            return str(error)
        except InputError as error:
            return str(error).replace(delivery.url[:200], str(urlsplit(delivery.url).hostname))
        return None if status < 300 else f"status {status}"


def signature(secret: str, body: bytes) -> dict[str, str]:
    """Headers that show who sent a body, and when: an old one cannot be sent again unnoticed."""
    timestamp = str(int(time.time()))
    signed = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return {
        "X-Webhook-Timestamp": timestamp,
        "X-Webhook-Signature": f"sha256={signed.hexdigest()}",
    }
