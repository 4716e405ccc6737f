"""How much work a caller may ask for within a minute."""

from collections import OrderedDict
from time import monotonic

from csm_jax.serve.caller import Caller
from csm_jax.serve.errors import ApiError

# Callers whose use is remembered, at most.
MAX_CALLERS = 10_000


class Rates:
    """A bucket of tokens for each caller, full at first, that fills up within a minute.

    A bucket can be overdrawn: then its caller waits until the debt is paid.
    """

    def __init__(self, per_minute: float, what: str):
        """Args: per_minute: 0 is any number. what: the things that are counted, for messages."""
        self._per_minute = per_minute
        self._what = what
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, caller: str) -> None:
        """Takes a token. Raises `ApiError` if there is none."""
        self.check(caller, 1.0)
        self.charge(caller, 1.0)

    def check(self, caller: str, tokens: float) -> None:
        """Raises `ApiError` unless there are so many tokens."""
        if not self._per_minute or (missing := tokens - self._tokens(caller)) <= 0:
            return
        wait = max(1, round(missing * 60 / self._per_minute))
        message = f"more than {self._per_minute:g} {self._what} a minute; wait {wait} s"
        raise ApiError(429, message, code="rate_limited", retry_after=wait)

    def charge(self, caller: str, tokens: float) -> None:
        """Takes tokens, also those that are not there."""
        if not self._per_minute:
            return
        left = self._tokens(caller) - tokens
        self._buckets[caller] = (left, monotonic())
        self._buckets.move_to_end(caller)
        if len(self._buckets) > MAX_CALLERS:
            self._forget()

    def _tokens(self, caller: str) -> float:
        tokens, since = self._buckets.get(caller, (float(self._per_minute), 0.0))
        return min(self._per_minute, tokens + (monotonic() - since) * self._per_minute / 60)

    def _forget(self) -> None:
        """Forgets the caller with the fewest debts among those that were idle longest.

        Otherwise one who uses many addresses could make the server forget a debt of another.
        """
        oldest = [caller for caller, _ in zip(self._buckets, range(8), strict=False)]
        del self._buckets[max(oldest, key=self._tokens)]


class Quotas:
    """The work of callers: requests and utterances, and seconds of speech.

    An HTTP request and the opening of a WebSocket are counted when they come; so is each sentence
    that a WebSocket speaks, and each line of a scene beyond the first. Seconds of speech are
    charged when they have been spoken, since nobody knows them before; a caller in debt waits.

    Speech in the background (lines of a batch) is not charged: it takes only the rows that nobody
    else wants, and a batch would otherwise keep its owner from all live requests for hours.
    """

    def __init__(self, requests_per_minute: int, speech_seconds_per_minute: int):
        self._requests = Rates(requests_per_minute, "requests and utterances")
        self._seconds = Rates(speech_seconds_per_minute, "seconds of speech")

    def count(self, share: str) -> None:
        """Counts a request or an utterance. Raises `ApiError` for one too many."""
        self._requests.count(share)

    def count_more(self, share: str, number: int) -> None:
        """Counts utterances of a request that has been let in already."""
        self._requests.charge(share, number)

    def check_speech(self, caller: Caller) -> None:
        """Raises `ApiError` for a caller that has spoken more than its share."""
        if caller.share:
            self._seconds.check(caller.share, 0.0)

    def charge_speech(self, caller: Caller, seconds: float) -> None:
        """Counts speech that has been spoken."""
        if caller.share:
            self._seconds.charge(caller.share, seconds)
