"""A request that is being spoken, as coroutines see it."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from csm_jax.errors import CSMError
from csm_jax.request import Notice
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import ClientGoneError
from csm_jax.serve.middleware.request_log import note, request_id
from csm_jax.ticket import Ticket

if TYPE_CHECKING:
    from csm_jax.serve.service import Service


class Live:
    """A request that is being spoken. It is cancelled when its block ends."""

    def __init__(
        self,
        service: "Service",
        caller: Caller,
        ticket: Ticket,
        stream: bool,
        started: float,
        notices: Sequence[Notice],
        is_charged: bool,
    ):
        """Begins to listen to a ticket.

        Args:
          stream: whether chunks come while it is spoken.
          notices: what the listener should know besides what the ticket says.
          is_charged: whether the caller's quota counts the speech.
        """
        self.name = request_id()
        self.unread_seconds = self.taken_seconds = 0.0
        self._service = service
        self._caller = caller
        self._is_charged = is_charged
        self._ticket = ticket
        self._stream = stream
        self._started = started
        self._notices = notices
        self._chunks: deque[np.ndarray] = deque()
        self._is_over = False
        self._changed = asyncio.Event()
        self._is_dropped = False
        self._sender: asyncio.Task | None = None
        service.readers.add(self)
        loop = asyncio.get_running_loop()
        ticket.add_listener(lambda chunk: loop.call_soon_threadsafe(self._put, chunk))

    @property
    def notice_kinds(self) -> str:
        """What a listener should know, such as "cut", with commas between; all of it in the end."""
        notices = *self._notices, *self._ticket.notices
        return ",".join(sorted({notice.kind for notice in notices}))

    def cancel(self) -> None:
        """Ends it at the next frame, if it is not over, and forgets what was not read."""
        self._ticket.cancel()
        self._service.readers.remove(self)
        self._chunks.clear()
        self.unread_seconds = 0.0

    def drop(self) -> None:
        """Ends it although its reader has not left: that is too slow."""
        self.cancel()
        self._is_dropped = True
        self._changed.set()
        if self._sender is not None:
            self._sender.cancel()

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """A block that sends the speech, and ends with `ClientGoneError` when it is dropped."""
        self._sender = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError as error:
            if not self._is_dropped or self._sender.uncancel():
                raise
            raise ClientGoneError from error
        finally:
            self._sender = None

    async def chunks(self) -> AsyncIterator[np.ndarray]:
        """The speech as it is made, float32 [n]; nothing of a request that does not stream.

        Raises:
          CSMError: it failed.
          ClientGoneError: it was dropped.
        """
        num_samples = 0
        try:
            while (chunk := await self._take()) is not None:
                if not num_samples:
                    self._service.metrics.first_audio.observe(self._elapsed)
                num_samples += len(chunk)
                yield chunk
            # It is over, so this does not wait; it raises what went wrong.
            self._ticket.codes()
        except CSMError as error:
            self._service.metrics.errors.labels(type(error).__name__).inc()
            raise
        finally:
            self.cancel()
            self._charge()
        if self._stream:
            self._report(num_samples)

    def _charge(self) -> None:
        """Charges what has been spoken, whether or not the client listened."""
        if self._is_charged:
            self._is_charged = False
            model = self._service.model
            seconds = len(self.codes_so_far()) * model.codec.frame_size / model.sample_rate
            self._service.quotas.charge_speech(self._caller, seconds)

    async def audio(self) -> np.ndarray:
        """All of it, float32 [num_samples]. Raises as `chunks` does."""
        chunks = [chunk async for chunk in self.chunks()]
        if self._stream:
            return np.concatenate([np.zeros(0, np.float32), *chunks])
        started = time.perf_counter()
        audio = await self._service.work(self._caller, self._ticket.result)
        self._ticket.timing.codec = time.perf_counter() - started
        self._report(len(audio))
        return audio

    def _put(self, chunk: np.ndarray | None) -> None:
        if chunk is None:
            self._is_over = True
        elif not self._ticket.is_cancelled:
            self._chunks.append(chunk)
            self.unread_seconds += self._seconds(chunk)
        self._changed.set()

    async def _take(self) -> np.ndarray | None:
        """The next chunk, None in the end."""
        while not self._chunks:
            if self._is_dropped:
                raise ClientGoneError
            if self._is_over:
                return None
            self._changed.clear()
            await self._changed.wait()
        chunk = self._chunks.popleft()
        self.unread_seconds = max(0.0, self.unread_seconds - self._seconds(chunk))
        self.taken_seconds += self._seconds(chunk)
        return chunk

    def _seconds(self, chunk: np.ndarray) -> float:
        return len(chunk) / self._service.model.sample_rate

    def codes(self) -> np.ndarray:
        """Of what has been spoken; int32 [num_frames, Q]. Only when it is over."""
        return self._ticket.codes()

    def codes_so_far(self) -> np.ndarray:
        """The same at any time."""
        return self._ticket.codes_so_far()

    @property
    def num_tokens(self) -> int:
        """Of the text."""
        return len(self._service.model.tokenizer.encode(self._ticket.request.text))

    @property
    def num_frames(self) -> int:
        """Of the speech. Only when it is over."""
        return len(self.codes())

    @property
    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def _report(self, num_samples: int) -> None:
        timing = self._ticket.timing
        seconds = num_samples / self._service.model.sample_rate
        self._service.metrics.spoke(timing, self._elapsed, seconds)
        note(audio_s=round(seconds, 3), **{f"{k}_s": round(v, 4) for k, v in vars(timing).items()})
