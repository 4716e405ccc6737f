"""Speech as coroutines see it: one engine, and what a request goes through on its way there."""

import asyncio
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from csm_jax.engine import Engine
from csm_jax.errors import InputError, first_line
from csm_jax.generator import Generator
from csm_jax.prompt import Segment, Turn
from csm_jax.request import Notice, Request
from csm_jax.serve.admission.caller import INTERNAL, Caller
from csm_jax.serve.admission.concurrency import Place, Places, Sockets
from csm_jax.serve.admission.rate_limits import Quotas
from csm_jax.serve.admission.read_pace import Readers
from csm_jax.serve.admission.thread_pools import FairPool
from csm_jax.serve.deadline import Deadline
from csm_jax.serve.errors import ApiError
from csm_jax.serve.jobs.runner import Jobs
from csm_jax.serve.jobs.webhooks import Webhooks
from csm_jax.serve.metrics import Metrics
from csm_jax.serve.middleware.authentication import Key, parse_keys
from csm_jax.serve.network.outbound_http import Outgoing
from csm_jax.serve.settings import Settings
from csm_jax.serve.speech_stream import Live
from csm_jax.serve.store import Store
from csm_jax.serve.voices.files import MAX_SPEAKER
from csm_jax.serve.voices.registry import Voice, Voices
from csm_jax.text import needed_seconds
from csm_jax.ticket import Ticket

T = TypeVar("T")

logger = logging.getLogger("csm_jax.serve")

# Threads for what takes a moment, such as the disk.
_THREADS = 4
# Threads that decode and compress recordings: what they call leaves Python's lock.
_WORK_THREADS = max(4, os.cpu_count() or 1)
# Two frames of this are spoken before the server is ready.
_WARM_UP = Request("a", max_audio_length_ms=160, guard="off")
# A voice is spoken under any number; the longest has the most tokens.
_SPEAKERS = (0, MAX_SPEAKER)
# Parts of the time to drain that are kept: for the engine and what comes after it, for webhooks
# and what comes after them, for closing the store.
_KEPT_FOR_ENGINE, _KEPT_FOR_WEBHOOKS, _KEPT_FOR_STORE = 0.1, 0.06, 0.03


class Service:
    """What all APIs speak through.

    Attributes:
      model, settings, metrics, voices: what it was made with.
      keys: the parsed API keys; none without authentication.
      store: everything that is kept, with its owners.
      jobs: requests that go on without their client.
      quotas: how much work callers may ask for.
      outgoing, webhooks: what requests ask the server to fetch and to post.
      places: how many requests are worked on or wait at once, shared between callers.
      sockets, followers: the open WebSockets, and streams of job states, of each caller.
      readers: the responses whose speech waits to be read.
      engine: speaks all requests.
      not_ready: why the server is not ready; None while it is.
      warmed: the task of `warm_up`, once the application has started it.
      is_closing: the engine takes no more requests.
      deadline: by which everything is over after the server was stopped.
    """

    def __init__(
        self,
        model: Generator,
        settings: Settings,
        presets: Sequence[Path],
        store: Store | None = None,
    ):
        """Reads the voices and starts the engine.

        Args:
          presets: directories of voices that come with the model.
          store: opened for these settings; default: opens it.
        """
        self.model = model
        self.settings = settings
        self.keys = parse_keys(settings.api_keys)
        self.metrics = Metrics()
        self.not_ready: str | None = "warming up"
        self.is_closing = False
        self.deadline = Deadline(settings.drain_seconds)
        self.warmed: asyncio.Task | None = None
        self.store = store or Store(settings.data, settings.limits)
        self.voices = Voices(
            model,
            [*presets, *filter(None, [settings.voices])],
            self.store.voices,
            settings.limits,
        )
        self.quotas = Quotas(settings.requests_per_minute, settings.speech_seconds_per_minute)
        self.outgoing = Outgoing(settings.allow_private)
        self.webhooks = Webhooks(self.store.jobs, self.outgoing, settings.webhook_secret)
        self.jobs = Jobs(self.store.jobs, self.webhooks, settings.max_batch, settings.max_queue)
        self.places = Places(settings.max_batch + settings.max_queue)
        self.sockets = Sockets(settings.limits.sockets_per_caller)
        self.followers = Sockets(settings.limits.sockets_per_caller, "streams of job states")
        self.readers = Readers(settings.limits)
        self._threads = ThreadPoolExecutor(_THREADS, "csm_jax.serve")
        self._workers = FairPool(_WORK_THREADS, "csm_jax.serve.work")
        # Of its own, and one thread: encoding has the whole machine at work.
        self._encoders = FairPool(1, "csm_jax.serve.encode")
        # Compiling takes seconds: one after the other, and nothing else waits for its thread.
        self._compiler = ThreadPoolExecutor(1, "csm_jax.serve.compile")
        self._compiling: set[asyncio.Task] = set()
        self.engine = Engine(
            model,
            settings.max_batch,
            settings.max_seq_len,
            # What has a place is not refused any more.
            max_queue=self.places.total,
            kept_rows=int(_has_tenants(self.keys)),
            # Without tenants a lone address has all rows.
            kept_beside_others=1,
        )
        self.metrics.watch_engine(self.engine)
        self.metrics.watch_database(self.store.database)

    @property
    def is_ready(self) -> bool:
        """Whether everything is compiled and a request has been spoken."""
        return self.not_ready is None

    async def warm_up(self) -> None:
        """Compiles all that requests need, and speaks; then the server is ready."""
        started = time.perf_counter()
        try:
            await self._compile(self.voices.all_owners())
            live = await self.speak(_WARM_UP, INTERNAL, stream=True, wait=True)
            await live.audio()
        except Exception as error:
            self.not_ready = f"the warm-up failed: {first_line(error)}"
            logger.error("%s; this server will not be ready", self.not_ready)
            return
        logger.info("ready after %.1f s of warming up", time.perf_counter() - started)
        if not self.deadline.is_started:
            self.not_ready = None

    async def _compile(self, voices: Sequence[Voice]) -> None:
        """Compiles what requests need that begin with these voices, outside the event loop."""
        config, tokenizer = self.model.config, self.model.tokenizer
        unwanted = threading.Event()

        def compile_in_turn() -> None:
            turns = [voice.turn(speaker) for voice in voices for speaker in _SPEAKERS]
            lengths = [Turn(turn, config, tokenizer).length for turn in turns]
            self.engine.warm_up(lengths, unwanted.is_set)

        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._compiler, compile_in_turn)
        finally:
            unwanted.set()

    def drain(self) -> None:
        """Lets the deadline run: from now on new requests are refused, and the others finish."""
        self.deadline.start()
        self.not_ready = "closing"

    async def close(self) -> None:
        """Finishes what is in progress, as far as the deadline allows."""
        self.drain()
        await self.jobs.close(self.deadline.left_before(_KEPT_FOR_ENGINE))
        self.is_closing = True
        seconds = self.deadline.left_before(_KEPT_FOR_WEBHOOKS)
        await asyncio.to_thread(self.engine.close, True, seconds)
        await self.webhooks.close(self.deadline.left_before(_KEPT_FOR_STORE))
        await self.outgoing.close()
        await asyncio.to_thread(self.store.close)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._workers.close()
        self._encoders.close()
        for task in self._compiling:
            task.cancel()
        self._compiler.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls what takes a moment, such as the disk, outside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(function, *arguments))

    async def work(self, caller: Caller, function: Callable[..., T], *arguments: Any) -> T:
        """Calls what takes long, such as decoding a recording, when it is the caller's turn."""
        return await self._workers.run(caller, function, *arguments)

    async def encode(self, audio: np.ndarray, caller: Caller) -> np.ndarray:
        """Codes int32 [num_frames, Q] of a recording, float32 [num_samples] at 24 kHz."""
        codec, count = self.model.codec, self.model.config.num_codebooks
        return await self._encoders.run(caller, codec.encode, audio, count)

    async def admit(self, caller: Caller, wait: bool = False) -> Place:
        """Takes a place, before anything costly is done for a request.

        Args:
          wait: until one is free, instead of being refused.

        Raises:
          ApiError: no place is free, or the server is closing.
        """
        if not wait:
            self._check_open()
        return await self.places.take(caller, wait)

    async def encoded(self, request: Request, caller: Caller) -> Request:
        """The request with codes instead of recordings, in those turns that fit the window.

        One turn is encoded after the other, so that those of other callers come between, and
        nothing is encoded any more for a request that was cancelled.
        """
        context = list(request.context)
        if not any(map(_is_unencoded, context)):
            return request
        plan = await self.work(caller, self.model.speech, request, _ignore, self.engine.max_seq_len)
        for index in range(len(context) - plan.num_turns, len(context)):
            if _is_unencoded(turn := context[index]):
                codes = await self.encode(turn.audio, caller)
                context[index] = dataclasses.replace(turn, audio=None, codes=codes)
        return dataclasses.replace(request, context=context)

    async def add_voice(
        self, caller: Caller, owner: str, name: str, speaker: int, text: str, audio: np.ndarray
    ) -> Voice:
        """`Voices.add`, when it is the caller's turn to encode; then it is as fast as others.

        While the server warms up, the voice is ready to be spoken before it is that fast.
        """
        voice = await self._encoders.run(caller, self.voices.add, owner, name, speaker, text, audio)
        compiling = asyncio.create_task(self._compile([voice]))
        self._compiling.add(compiling)
        compiling.add_done_callback(self._compiled)
        if self.is_ready:
            await asyncio.wait({compiling})
        return voice

    def _compiled(self, task: asyncio.Task) -> None:
        self._compiling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # It is compiled when it is needed.
            logger.warning("a voice's programs could not be compiled: %s", first_line(error))

    def _limited(self, request: Request) -> Request:
        """The request, cut at the longest that is spoken here. Raises `InputError` if it asks for
        more."""
        limit, wanted = self.settings.limits.speech_ms, request.max_audio_length_ms
        if wanted is not None and wanted > limit:
            raise InputError(f"max_audio_length_ms is {wanted:g}, but at most {limit:g} are spoken")
        if wanted is None and 1000 * needed_seconds(request.text) > limit:
            return dataclasses.replace(request, max_audio_length_ms=limit)
        return request

    def _check_open(self) -> None:
        if self.deadline.is_started:
            raise _closing()

    async def speak(
        self,
        request: Request,
        caller: Caller,
        *,
        stream: bool,
        background: bool = False,
        wait: bool = False,
        notices: Sequence[Notice] = (),
    ) -> Live:
        """Hands a request to the engine, after its context was encoded.

        Args:
          caller: whose share of the engine it uses.
          stream: whether chunks are wanted while it speaks; otherwise only the whole.
          background: behind all others.
          wait: for a place in the queue.
          notices: what the listener should know of how the request was made.

        Raises:
          ApiError: the server is closing, or the caller has spoken more than its share.
          CSMError: as `Engine.submit`.
        """
        if self.is_closing:
            raise _closing()
        if not background:
            self.quotas.check_speech(caller)
        started = time.perf_counter()
        request = await self.encoded(self._limited(request), caller)
        submission = _Submission(self.engine)
        named = dict(stream=stream, wait=wait, background=background, keep=False)
        named |= dict(share=caller.share, weight=caller.weight)
        try:
            ticket = await self.work(caller, functools.partial(submission.run, request, **named))
        except asyncio.CancelledError:
            submission.cancel()
            raise
        return Live(self, caller, ticket, stream, started, notices, is_charged=not background)


def _closing() -> ApiError:
    return ApiError(503, "the server is closing", code="closing", retry_after=10)


class _Submission:
    """A request on its way to the engine, in a thread; it can be cancelled at any time."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._ticket: Ticket | None = None
        self._is_cancelled = False

    def run(self, request: Request, **named: Any) -> Ticket:
        self._ticket = ticket = self._engine.submit(request, **named)
        # One of the two threads sees what the other has set.
        if self._is_cancelled:
            ticket.cancel()
        return ticket

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._ticket is not None:
            self._ticket.cancel()


def _has_tenants(keys: Sequence[Key]) -> bool:
    """Whether keys name several tenants, so that one row is kept for a tenant without a row."""
    return len({key.caller.owner for key in keys}) > 1


def _is_unencoded(turn: Segment) -> bool:
    return turn.codes is None and turn.audio is not None


def _ignore(notice: Notice) -> None:
    """Drops a notice: `Engine.submit` plans again and reports it."""
