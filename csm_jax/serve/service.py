"""Speech as coroutines see it: one engine, and what a request goes through on its way there."""

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from csm_jax.batch import MAX_PREFIXES, MIN_BUCKET
from csm_jax.engine import Engine
from csm_jax.errors import CSMError, InputError
from csm_jax.generator import Generator
from csm_jax.prompt import Segment
from csm_jax.serve.caller import INTERNAL, Caller
from csm_jax.serve.errors import ApiError
from csm_jax.serve.jobs import Jobs
from csm_jax.serve.metrics import Metrics
from csm_jax.serve.middleware.log import note
from csm_jax.serve.outgoing import Outgoing
from csm_jax.serve.quotas import Quotas
from csm_jax.serve.settings import Settings
from csm_jax.serve.store import Store
from csm_jax.serve.voices import Voices
from csm_jax.serve.webhook import Webhooks
from csm_jax.speech import Request
from csm_jax.text import needed_seconds
from csm_jax.ticket import Ticket

T = TypeVar("T")

logger = logging.getLogger("csm_jax.serve")

# Threads that encode contexts, decode and compress: what they call leaves Python's lock.
_THREADS = 4
# What jobs get that are not over when the server is told to end.
_JOB_SECONDS = 60
# Two frames of this are spoken before anybody is let in.
_WARM_UP = Request("a", max_audio_length_ms=160, guard="off")
# Positions that its texts and frames may take.
_TEXT_ROOM = 24


class Service:
    """What all APIs speak through.

    Attributes:
      model, settings, metrics, voices: what it was made with.
      store: everything that is kept, with its owners.
      jobs: requests that go on without their client.
      quotas: how much work callers may ask for.
      outgoing, webhooks: what requests ask the server to fetch and to post.
      is_ready: the frame loop is compiled, and a request has been spoken.
    """

    def __init__(
        self, model: Generator, settings: Settings, presets: list[Path], store: Store | None = None
    ):
        """Args:
        presets: directories of voices that come with the model.
        store: opened for these settings; default: opens it.
        """
        self.model = model
        self.settings = settings
        self.metrics = Metrics()
        self.is_ready = False
        self.is_closing = False
        self.warmed: asyncio.Task | None = None
        self.store = store or Store(settings.data, settings.limits)
        self.voices = Voices(
            model,
            [*presets, *filter(None, [settings.voices])],
            self.store.voices,
            settings.limits,
            old=settings.data and settings.data / "voices",
        )
        self.quotas = Quotas(settings.requests_per_minute, settings.speech_seconds_per_minute)
        self.outgoing = Outgoing(settings.allow_private)
        self.webhooks = Webhooks(self.store.jobs, self.outgoing, settings.webhook_secret)
        self.jobs = Jobs(self.store.jobs, self.webhooks, settings.max_batch, settings.max_queue)
        self._threads = ThreadPoolExecutor(_THREADS, "csm_jax.serve")
        self.engine = Engine(
            model, settings.max_batch, settings.max_seq_len, max_queue=settings.max_queue
        )
        self.metrics.watch(self.engine)
        self.metrics.watch_store(self.store.database)

    async def warm_up(self) -> None:
        """Speaks in all the shapes that requests come in, so that nobody waits for a compiler."""
        started = time.perf_counter()
        try:
            # What the guard compares with, which these requests do without.
            await self.in_thread(lambda: self.model.silent_codes)
            for request in (*self._all_lengths(), *self._all_voices()):
                for stream in (True, False):
                    live = await self.speak(request, INTERNAL, stream=stream, wait=True)
                    await live.audio()
        except Exception:
            # Whoever asks /readyz hears no to the end; why, stands here.
            logger.exception("the warm-up failed: this server will not be ready")
            raise
        logger.info("ready after %.1f s of warming up", time.perf_counter() - started)
        self.is_ready = True

    def _all_lengths(self) -> Iterator[Request]:
        """Contexts that make prompts as long as the engine compiles for."""
        shape = (1, self.model.config.num_codebooks)
        length = MIN_BUCKET
        while length <= self.engine.max_seq_len:
            codes = np.repeat(np.ones(shape, np.int32), length - _TEXT_ROOM, axis=0)
            context = [Segment(0, ".", codes=codes)]
            yield dataclasses.replace(_WARM_UP, context=context)
            length *= 2

    def _all_voices(self) -> Iterator[Request]:
        for voice in self.voices.all(INTERNAL.owner)[:MAX_PREFIXES]:
            yield dataclasses.replace(
                _WARM_UP, speaker=voice.speaker, context=[voice.turn()], shared_turns=1
            )

    async def close(self) -> None:
        """Lets everybody finish."""
        self.is_ready = False
        await self.jobs.close(_JOB_SECONDS)
        self.is_closing = True
        await asyncio.to_thread(self.engine.close, finish=True)
        await self.webhooks.close()
        await self.outgoing.close()
        await asyncio.to_thread(self.store.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls what takes long without holding up the others."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(function, *arguments))

    def _limited(self, request: Request) -> Request:
        """The request, cut at the longest that is spoken here. Raises `InputError` if it asks for
        more."""
        limit, wanted = self.settings.limits.speech_ms, request.max_audio_length_ms
        if wanted is not None and wanted > limit:
            raise InputError(f"max_audio_length_ms is {wanted:g}, but at most {limit:g} are spoken")
        if wanted is None and 1000 * needed_seconds(request.text) > limit:
            return dataclasses.replace(request, max_audio_length_ms=limit)
        return request

    async def encode(self, audio: np.ndarray) -> np.ndarray:
        """Codes int32 [num_frames, Q] of a recording, float32 [num_samples] at 24 kHz."""
        codec, count = self.model.codec, self.model.config.num_codebooks
        return await self.in_thread(codec.encode, audio, count)

    async def speak(
        self,
        request: Request,
        caller: Caller,
        *,
        stream: bool,
        background: bool = False,
        wait: bool = False,
    ) -> "Live":
        """Hands a request to the engine.

        Args:
          caller: whose share of the engine it uses.
          stream: whether chunks are wanted while it speaks; otherwise only the whole.
          background: behind all others.
          wait: for a place in the queue.

        Raises:
          ApiError: the server is closing, or the caller has spoken more than its share.
          CSMError: as `Engine.submit`.
        """
        if self.is_closing:
            raise ApiError(503, "the server is closing", code="closing", retry_after=10)
        if not background:
            self.quotas.check_speech(caller)
        request = self._limited(request)
        started = time.perf_counter()
        submitted = self._threads.submit(
            self.engine.submit, request, stream=stream, wait=wait, background=background
        )
        try:
            ticket = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_ticket)
            raise
        return Live(self, ticket, stream, started, None if background else caller)


def _cancel_ticket(submitted: Future[Ticket]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


class Live:
    """A request that is being spoken. Whoever leaves it before its end calls `cancel`."""

    def __init__(
        self,
        service: Service,
        ticket: Ticket,
        streams: bool,
        started: float,
        payer: Caller | None,
    ):
        """Args: payer: the caller who is charged for the speech, if one is."""
        self._service = service
        self._payer = payer
        self._ticket = ticket
        self._streams = streams
        self._started = started
        self._chunks: asyncio.Queue[np.ndarray | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hand_over(chunk: np.ndarray | None) -> None:
            loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)

        ticket.add_listener(hand_over)

    @property
    def notice_kinds(self) -> str:
        """What a listener should know, such as "cut", with commas between; all of it in the end."""
        return ",".join(sorted({notice.kind for notice in self._ticket.notices}))

    def cancel(self) -> None:
        """Ends it at the next frame, if it is not over."""
        self._ticket.cancel()

    async def chunks(self) -> AsyncIterator[np.ndarray]:
        """The speech as it is made, float32 [n]; nothing of a request that does not stream.

        Raises:
          CSMError: it failed.
        """
        num_samples = 0
        try:
            while (chunk := await self._chunks.get()) is not None:
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
        if self._streams:
            self._report(num_samples)

    def _charge(self) -> None:
        """Charges what has been spoken, whether or not somebody listened."""
        payer, self._payer = self._payer, None
        if payer is not None:
            model = self._service.model
            seconds = len(self.codes_so_far()) * model.codec.frame_size / model.sample_rate
            self._service.quotas.charge_speech(payer, seconds)

    async def audio(self) -> np.ndarray:
        """All of it, float32 [num_samples]. Raises as `chunks` does."""
        chunks = [chunk async for chunk in self.chunks()]
        if self._streams:
            return np.concatenate([np.zeros(0, np.float32), *chunks])
        started = time.perf_counter()
        audio = await self._service.in_thread(self._ticket.result)
        self._ticket.timing.codec = time.perf_counter() - started
        self._report(len(audio))
        return audio

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
