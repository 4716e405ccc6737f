"""The speech of one request, streamed from the engine to its response."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Protocol

import numpy as np

from csm_jax.errors import CSMError
from csm_jax.inference.alignment.words import Word
from csm_jax.inference.generator import Generator
from csm_jax.inference.request import Notice
from csm_jax.inference.ticket import Ticket
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.admission.rate_limits import RateLimits
from csm_jax.serve.admission.read_pace import ReadPaceMonitor
from csm_jax.serve.admission.thread_pools import ThreadPools
from csm_jax.serve.errors import ClientGoneError
from csm_jax.serve.metrics import Metrics
from csm_jax.serve.middleware.request_log import add_log_fields, request_id
from csm_jax.watermark import Watermark


class StreamServices(Protocol):
    """What a stream needs of the server."""

    model: Generator
    metrics: Metrics
    rate_limits: RateLimits
    read_pace: ReadPaceMonitor
    threads: ThreadPools
    watermark: Watermark | None


class SpeechStream:
    """The speech of a request to the engine. It must be read to its end, or cancelled."""

    def __init__(
        self,
        service: StreamServices,
        caller: Caller,
        ticket: Ticket,
        words: Sequence[Word],
        stream: bool,
        started: float,
        notices: Sequence[Notice],
        is_charged: bool,
    ):
        """Begins to receive the chunks of a ticket.

        Args:
          words: to which the engine adds each word before the chunk in which it ends.
          stream: whether chunks arrive during generation.
          started: when the request was submitted, by `time.perf_counter`.
          notices: those that arose before the request reached the engine.
          is_charged: whether the speech counts for the caller's rate limit.
        """
        self.name = request_id()
        self.unread_seconds = self.taken_seconds = 0.0
        self._service = service
        self._caller = caller
        self._is_charged = is_charged
        self._ticket = ticket
        self._words = words
        self._num_taken_words = 0
        self._stream = stream
        self._started = started
        self._notices = notices
        self._chunks: deque[np.ndarray] = deque()
        self._has_ended = False
        self._changed = asyncio.Event()
        self._is_dropped = False
        self._sender: asyncio.Task | None = None
        service.read_pace.add(self)
        loop = asyncio.get_running_loop()

        def receive(chunk: np.ndarray | None) -> None:
            loop.call_soon_threadsafe(self._put, chunk)

        ticket.add_listener(receive)

    @property
    def notice_kinds(self) -> str:
        """The kinds of all notices so far, such as "cut", separated by commas."""
        notices = *self._notices, *self._ticket.notices
        return ",".join(sorted({notice.kind for notice in notices}))

    def cancel(self) -> None:
        """Ends generation at the next frame, and drops the chunks that were not read."""
        self._ticket.cancel()
        self._service.read_pace.remove(self)
        self._chunks.clear()
        self.unread_seconds = 0.0

    def drop(self) -> None:
        """Ends the stream and its response, because the client reads too slowly."""
        self.cancel()
        self._is_dropped = True
        self._changed.set()
        if self._sender is not None:
            self._sender.cancel()

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Runs a block that sends the speech; `drop` ends the block with `ClientGoneError`."""
        self._sender = sender = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError as error:
            if not self._is_dropped or (sender is not None and sender.uncancel()):
                raise
            raise ClientGoneError from error
        finally:
            self._sender = None

    async def chunks(self) -> AsyncIterator[np.ndarray]:
        """The chunks during generation, float32 [n]; none if the request does not stream.

        Raises:
          CSMError: the request failed.
          ClientGoneError: the stream was dropped.
        """
        num_samples = 0
        try:
            async for chunk in self._marked_chunks():
                if not num_samples:
                    self._service.metrics.first_audio.observe(self._elapsed)
                num_samples += len(chunk)
                yield chunk
            # The request has ended, so this does not wait; it raises the error if there was one.
            self._ticket.codes()
        except CSMError as error:
            self._service.metrics.errors.labels(type(error).__name__).inc()
            raise
        finally:
            self.cancel()
            self._charge()
        if self._stream:
            self._report(num_samples)

    async def _marked_chunks(self) -> AsyncIterator[np.ndarray]:
        """The chunks of the engine, with a watermark if the server has one."""
        service = self._service
        if service.watermark is None:
            while (chunk := await self._take()) is not None:
                yield chunk
            return
        marker = service.watermark.marker(service.model.sample_rate)
        while (chunk := await self._take()) is not None:
            marked = await service.threads.work(self._caller, marker.add, chunk)
            if len(marked):
                yield marked
        marked = await service.threads.work(self._caller, marker.finish)
        if len(marked):
            yield marked

    def _charge(self) -> None:
        """Charges the generated speech, whether or not the client has read it."""
        if self._is_charged:
            self._is_charged = False
            model = self._service.model
            seconds = len(self.codes_so_far()) * model.codec.frame_size / model.sample_rate
            self._service.rate_limits.charge_speech(self._caller, seconds)

    async def audio(self) -> np.ndarray:
        """The whole speech, float32 [num_samples]. Raises the errors of `chunks`."""
        chunks = [chunk async for chunk in self.chunks()]
        if self._stream:
            return np.concatenate([np.zeros(0, np.float32), *chunks])
        started = time.perf_counter()
        audio = await self._service.threads.work(self._caller, self._ticket.result)
        self._ticket.timing.codec = time.perf_counter() - started
        if (watermark := self._service.watermark) is not None:
            rate = self._service.model.sample_rate
            audio = await self._service.threads.work(self._caller, watermark.embed, audio, rate)
        self._report(len(audio))
        return audio

    def _put(self, chunk: np.ndarray | None) -> None:
        if chunk is None:
            self._has_ended = True
        elif not self._ticket.is_cancelled:
            self._chunks.append(chunk)
            self.unread_seconds += self._seconds(chunk)
        self._changed.set()

    async def _take(self) -> np.ndarray | None:
        """The next chunk; None at the end."""
        while not self._chunks:
            if self._is_dropped:
                raise ClientGoneError
            if self._has_ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        chunk = self._chunks.popleft()
        self.unread_seconds = max(0.0, self.unread_seconds - self._seconds(chunk))
        self.taken_seconds += self._seconds(chunk)
        return chunk

    def _seconds(self, chunk: np.ndarray) -> float:
        return len(chunk) / self._service.model.sample_rate

    @property
    def has_words(self) -> bool:
        """Whether the model knows when words are spoken."""
        return self._service.model.alignment is not None

    @property
    def words_so_far(self) -> Sequence[Word]:
        """The words whose times are certain, by the frames alone."""
        return self._words

    def take_words(self) -> Sequence[Word]:
        """The words whose times have become certain since the last call."""
        new = self._words[self._num_taken_words :]
        self._num_taken_words += len(new)
        return new

    async def words(self, audio: np.ndarray) -> list[Word]:
        """The words of the whole speech, whose sound sharpens their times.

        Args:
          audio: float32 [num_samples], what `audio` has returned.
        """
        return await self._service.threads.work(self._caller, self._ticket.alignment.words, audio)

    @property
    def text(self) -> str:
        """The transcript of the speech."""
        return self._ticket.request.spoken_text

    def codes(self) -> np.ndarray:
        """The codes of the whole speech, int32 [num_frames, Q], after its end."""
        return self._ticket.codes()

    def codes_so_far(self) -> np.ndarray:
        """The codes that have been generated, int32 [num_frames, Q]."""
        return self._ticket.codes_so_far()

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the text."""
        return len(self._service.model.tokenizer.encode(self.text))

    @property
    def num_frames(self) -> int:
        """The number of frames of the speech, after its end."""
        return len(self.codes())

    @property
    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def _report(self, num_samples: int) -> None:
        timing = self._ticket.timing
        seconds = num_samples / self._service.model.sample_rate
        self._service.metrics.record_speech(timing, self._elapsed, seconds)
        stages = {f"{name}_s": round(value, 4) for name, value in vars(timing).items()}
        add_log_fields(audio_s=round(seconds, 3), **stages)
