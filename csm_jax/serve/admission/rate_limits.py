"""How many requests, and seconds of speech, a caller may ask for within a minute."""

from collections import OrderedDict
from time import monotonic

from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import ApiError

# Callers whose use is remembered, at most.
MAX_CALLERS = 10_000


class TokenBuckets:
    """A token bucket for each share, which is full at first and refills within a minute.

    A bucket can be overdrawn: then its share is refused until the debt is paid.
    """

    def __init__(self, per_minute: float, unit: str):
        """Starts with full buckets.

        Args:
          per_minute: tokens; 0 is any number.
          unit: names what a token stands for in messages.
        """
        self._per_minute = per_minute
        self._unit = unit
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, share: str) -> None:
        """Takes a token. Raises `ApiError` if there is none."""
        self.check(share, 1.0)
        self.charge(share, 1.0)

    def check(self, share: str, tokens: float) -> None:
        """Raises `ApiError` if there are fewer tokens."""
        if not self._per_minute or (missing := tokens - self._tokens(share)) <= 0:
            return
        wait = max(1, round(missing * 60 / self._per_minute))
        message = f"more than {self._per_minute:g} {self._unit} a minute; wait {wait} s"
        raise ApiError(429, message, code="rate_limited", retry_after=wait)

    def charge(self, share: str, tokens: float) -> None:
        """Takes tokens, more than there are if need be."""
        if not self._per_minute:
            return
        left = self._tokens(share) - tokens
        self._buckets[share] = (left, monotonic())
        self._buckets.move_to_end(share)
        if len(self._buckets) > MAX_CALLERS:
            self._forget()

    def _tokens(self, share: str) -> float:
        tokens, since = self._buckets.get(share, (float(self._per_minute), 0.0))
        return min(self._per_minute, tokens + (monotonic() - since) * self._per_minute / 60)

    def _forget(self) -> None:
        """Forgets the share with the smallest debt among the eight that were idle longest.

        Otherwise a client with many addresses could make the server forget another one's debt.
        """
        oldest = [share for share, _ in zip(self._buckets, range(8), strict=False)]
        del self._buckets[max(oldest, key=self._tokens)]


class RateLimits:
    """The limits of each caller: requests and utterances, and seconds of speech, per minute.

    An HTTP request and the opening of a WebSocket are counted when they arrive; so is each sentence
    that a WebSocket speaks, and each line of a scene beyond the first. Seconds of speech are
    charged after generation, since their number is not known before.

    Background speech (lines of a batch) is not charged: it takes only slots that no interactive
    request needs, and a batch would otherwise block all other requests of its owner for hours.
    """

    def __init__(self, requests_per_minute: int, speech_seconds_per_minute: int):
        self._requests = TokenBuckets(requests_per_minute, "requests and utterances")
        self._seconds = TokenBuckets(speech_seconds_per_minute, "seconds of speech")

    def count(self, caller: Caller) -> None:
        """Counts a request or an utterance. Raises `ApiError` beyond the limit."""
        self._requests.count(caller.share)

    def count_more(self, caller: Caller, number: int) -> None:
        """Counts further utterances of a request that has been counted itself."""
        self._requests.charge(caller.share, number)

    def check_speech(self, caller: Caller) -> None:
        """Raises `ApiError` for a caller that has used more seconds of speech than it may."""
        if caller.share:
            self._seconds.check(caller.share, 0.0)

    def charge_speech(self, caller: Caller, seconds: float) -> None:
        """Counts speech that has been generated."""
        if caller.share:
            self._seconds.charge(caller.share, seconds)
