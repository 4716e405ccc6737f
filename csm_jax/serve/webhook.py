"""Results that are posted to whoever asked for them, signed and with patience."""

import asyncio
import hashlib
import hmac
import json
import logging
import time

from csm_jax.errors import InputError
from csm_jax.serve.errors import ApiError
from csm_jax.serve.outgoing import Outgoing, check_url

logger = logging.getLogger("csm_jax.serve")

# Seconds between attempts.
PAUSES = (1.0, 5.0, 30.0, 120.0)
# Posts that may be under way.
_MAX_PENDING = 100


class Webhooks:
    """Posts results in the background."""

    def __init__(self, outgoing: Outgoing, secret: str):
        """Args: secret: what bodies are signed with; without one nothing is posted."""
        self._outgoing = outgoing
        self._secret = secret
        self._tasks: set[asyncio.Task] = set()

    def check(self, url: str) -> None:
        """Raises `ApiError` or `InputError` if a result could not be posted to `url`."""
        if not self._secret:
            message = "webhooks are off: start the server with CSM_JAX_WEBHOOK_SECRET"
            raise ApiError(400, message, param="webhook", code="webhooks_off")
        check_url(url)
        if len(self._tasks) >= _MAX_PENDING:
            raise ApiError(429, "too many webhooks wait", code="queue_full", retry_after=10)

    def post(self, url: str, result: dict) -> None:
        """Begins to post a result."""
        task = asyncio.create_task(self._post(url, json.dumps(result).encode()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, seconds: float = 10.0) -> None:
        """Waits a little for those under way, and gives up the others."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in self._tasks:
            task.cancel()

    async def _post(self, url: str, body: bytes) -> None:
        for pause in (*PAUSES, None):
            try:
                status = await self._outgoing.post(url, body, signature(self._secret, body))
                if status < 300:
                    return
                reason = f"status {status}"
            except InputError as error:
                reason = str(error)
            if pause is not None:
                await asyncio.sleep(pause)
        attempts = len(PAUSES) + 1
        logger.warning("a webhook was given up after %d attempts: %s", attempts, reason)


def signature(secret: str, body: bytes) -> dict[str, str]:
    """Headers that show who sent a body, and when: an old one cannot be sent again unnoticed."""
    timestamp = str(int(time.time()))
    signed = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return {
        "X-Webhook-Timestamp": timestamp,
        "X-Webhook-Signature": f"sha256={signed.hexdigest()}",
    }
