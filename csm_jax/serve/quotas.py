"""How much work a caller may ask for within a minute."""

from collections import OrderedDict
from time import monotonic

from csm_jax.serve.errors import ApiError

# Callers whose use is remembered, at most.
MAX_CALLERS = 10_000


class Rates:
    """A bucket of tokens for each caller, full at first, that fills up within a minute."""

    def __init__(self, per_minute: int):
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, caller: str) -> None:
        """Takes a token, or raises `ApiError`."""
        if not self._per_minute:
            return
        now = monotonic()
        tokens, since = self._buckets.pop(caller, (float(self._per_minute), now))
        tokens = min(self._per_minute, tokens + (now - since) * self._per_minute / 60)
        self._buckets[caller] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            wait = max(1, round((1 - tokens) * 60 / self._per_minute))
            message = f"more than {self._per_minute} requests a minute; wait {wait} s"
            raise ApiError(429, message, code="rate_limited", retry_after=wait)
