"""What all APIs share: one engine, and everything that a request passes before and after it."""

import asyncio
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.errors import InputError, first_line
from csm_jax.inference.alignment.words import Word
from csm_jax.inference.engine import Engine
from csm_jax.inference.generator import Generator
from csm_jax.inference.request import Notice, Request
from csm_jax.inference.request_state import RequestState
from csm_jax.inference.ticket import Ticket
from csm_jax.prompt.splitting import needed_seconds
from csm_jax.prompt.turns import Segment, Turn
from csm_jax.serve.admission.api_keys import ApiKey, parse_keys
from csm_jax.serve.admission.caller import INTERNAL, Caller
from csm_jax.serve.admission.concurrency import Permit, RequestLimiter, StreamLimiter
from csm_jax.serve.admission.rate_limits import RateLimits
from csm_jax.serve.admission.read_pace import ReadPaceMonitor
from csm_jax.serve.admission.thread_pools import ThreadPools
from csm_jax.serve.deadline import Deadline
from csm_jax.serve.errors import ApiError
from csm_jax.serve.jobs.runner import JobRunner
from csm_jax.serve.jobs.webhooks import Webhooks
from csm_jax.serve.metrics import Metrics
from csm_jax.serve.network.outbound_http import OutboundHTTP
from csm_jax.serve.settings import Settings
from csm_jax.serve.speech_stream import SpeechStream
from csm_jax.serve.store import Store
from csm_jax.serve.voices.files import MAX_SPEAKER
from csm_jax.serve.voices.registry import Voice, Voices
from csm_jax.watermark import Watermark

logger = logging.getLogger("csm_jax.serve")

# Two frames of this are generated before the server is ready.
_WARM_UP = Request("a", max_audio_length_ms=160, guard="off")
NO_TRANSCRIPT = Notice(
    "no_transcript",
    "a recording of the context has no transcript: the speech can be less clear",
)
# A voice can have any speaker number; the longest number has the most tokens.
_SPEAKERS = (0, MAX_SPEAKER)
# Fractions of the drain time that are reserved: for the engine and everything after it, for
# webhooks and everything after them, for closing the store.
_RESERVED_FOR_ENGINE, _RESERVED_FOR_WEBHOOKS, _RESERVED_FOR_STORE = 0.1, 0.06, 0.03


class Service:
    """The server behind its APIs: the model, the engine, and the state that requests share.

    Attributes:
      model, settings, metrics, voices, watermark: what it was made with.
      keys: the parsed API keys; none without authentication.
      store: everything that is stored, with its owners.
      jobs: requests that run without their client.
      rate_limits: requests, and seconds of speech, of each caller per minute.
      outbound_http, webhooks: HTTP requests that the server makes for its callers.
      request_limiter: how many requests run or wait at once, shared between callers.
      socket_limiter, event_stream_limiter: open WebSockets, and streams of job states, per caller.
      read_pace: drops streams whose clients read too slowly.
      threads: for all work that would block the event loop.
      engine: generates the speech of all requests.
      not_ready: why the server is not ready; None while it is.
      warmed: the task of `warm_up`, once the application has started it.
      is_closing: the engine takes no more requests.
      deadline: when everything must have ended after the server was stopped.
    """

    def __init__(
        self,
        model: Generator,
        settings: Settings,
        presets: Sequence[Path],
        store: Store | None = None,
        watermark: Watermark | None = None,
    ):
        """Reads the voices and starts the engine.

        Args:
          presets: directories of voices that come with the model.
          store: opened for these settings; default: opens it.
          watermark: marks all speech; None leaves it as it is.
        """
        self.model = model
        self.watermark = watermark
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
        self._check_default_voice()
        self.rate_limits = RateLimits(
            settings.requests_per_minute, settings.speech_seconds_per_minute
        )
        self.outbound_http = OutboundHTTP(settings.allow_private)
        self.webhooks = Webhooks(self.store.jobs, self.outbound_http, settings.webhook_secret)
        self.jobs = JobRunner(
            self.store.jobs, self.webhooks, settings.max_batch, settings.max_queue
        )
        self.request_limiter = RequestLimiter(settings.max_batch + settings.max_queue)
        self.socket_limiter = StreamLimiter(settings.limits.sockets_per_caller)
        self.event_stream_limiter = StreamLimiter(
            settings.limits.sockets_per_caller, "streams of job states"
        )
        self.read_pace = ReadPaceMonitor(settings.limits)
        self.threads = ThreadPools()
        self._compiling: set[asyncio.Task] = set()
        self.engine = Engine(
            model,
            settings.max_batch,
            settings.max_seq_len,
            # A request that has a permit is not refused any more.
            max_queue=self.request_limiter.total,
            kept_rows=int(_has_tenants(self.keys)),
            # Without tenants a single address may use all slots.
            kept_beside_others=1,
        )
        self.metrics.watch_engine(self.engine)
        self.metrics.watch_database(self.store.database)

    def _check_default_voice(self) -> None:
        """Raises `InputError` if the default voice is neither a shared voice nor a number."""
        name = self.settings.default_voice
        if name is not None and not name.isdecimal():
            try:
                self.voices.find(name, "")
            except InputError as error:
                raise InputError(f"--default_voice: {error}") from error

    @property
    def is_ready(self) -> bool:
        """Whether everything is compiled and a first request has succeeded."""
        return self.not_ready is None

    async def warm_up(self) -> None:
        """Compiles all programs and runs a first request; then the server is ready."""
        started = time.perf_counter()
        try:
            await self._compile(self.voices.all())
            if self.watermark is not None:
                rate = self.model.sample_rate
                await self.threads.compile(functools.partial(self.watermark.warm_up, rate))
            speech = await self.speak(_WARM_UP, INTERNAL, stream=True, wait=True)
            await speech.audio()
        except Exception as error:
            self.not_ready = f"the warm-up failed: {first_line(error)}"
            logger.error("%s; this server will not be ready", self.not_ready)
            return
        logger.info("ready after %.1f s of warming up", time.perf_counter() - started)
        if not self.deadline.is_started:
            self.not_ready = None

    async def _compile(self, voices: Sequence[Voice]) -> None:
        """Compiles the programs of requests in these voices, outside the event loop."""
        config, tokenizer = self.model.config, self.model.tokenizer
        cancelled = threading.Event()

        def compile_voices() -> None:
            turns = [voice.turn(speaker) for voice in voices for speaker in _SPEAKERS]
            lengths = [Turn(turn, config, tokenizer).length for turn in turns]
            self.engine.warm_up(lengths, cancelled.is_set)

        try:
            await self.threads.compile(compile_voices)
        finally:
            cancelled.set()

    def drain(self) -> None:
        """Starts the deadline: new requests are refused from now on, and the others finish."""
        self.deadline.start()
        self.not_ready = "closing"

    async def close(self) -> None:
        """Finishes the requests in progress, as far as the deadline allows."""
        self.drain()
        await self.jobs.close(self.deadline.left_before(_RESERVED_FOR_ENGINE))
        self.is_closing = True
        seconds = self.deadline.left_before(_RESERVED_FOR_WEBHOOKS)
        await asyncio.to_thread(self.engine.close, True, seconds)
        await self.webhooks.close(self.deadline.left_before(_RESERVED_FOR_STORE))
        await self.outbound_http.close()
        await asyncio.to_thread(self.store.close)
        for task in self._compiling:
            task.cancel()
        self.threads.close()

    async def encode(self, audio: np.ndarray, caller: Caller) -> np.ndarray:
        """The codes of a recording, float32 [num_samples] at 24 kHz, as int32 [num_frames, Q]."""
        codec, count = self.model.codec, self.model.config.num_codebooks
        return await self.threads.encode(caller, codec.encode, audio, count)

    async def admit(self, caller: Caller, wait: bool = False) -> Permit:
        """Acquires a permit for a request, before any costly work is done for it.

        Args:
          wait: waits until there is a permit, instead of raising an error.

        Raises:
          ApiError: there is no permit for this caller (429), or the server is closing (503).
        """
        if not wait:
            self._check_open()
        return await self.request_limiter.acquire(caller, wait)

    async def encode_context(self, request: Request, caller: Caller) -> Request:
        """The request with codes instead of recordings, in the turns that fit the window.

        Turns are encoded one by one, so that turns of other callers can be encoded in between, and
        encoding stops when the request is cancelled.
        """
        context = list(request.context)
        if not any(map(_is_unencoded, context)):
            return request
        window = self.engine.max_seq_len
        plan = await self.threads.work(caller, RequestState, self.model, request, _ignore, window)
        for index in plan.kept_turns:
            turn = context[index]
            if turn.codes is None and turn.audio is not None:
                codes = await self.encode(turn.audio, caller)
                context[index] = dataclasses.replace(turn, audio=None, codes=codes)
        return dataclasses.replace(request, context=context)

    async def add_voice(
        self, caller: Caller, owner: str, name: str, speaker: int, text: str, audio: np.ndarray
    ) -> Voice:
        """`Voices.add`, when it is the caller's turn to encode, and then compiles for the voice.

        While the server warms up, the voice is added before its programs are compiled.
        """
        arguments = (owner, name, speaker, text, audio)
        voice = await self.threads.encode(caller, self.voices.add, *arguments)
        compiling = asyncio.create_task(self._compile([voice]))
        self._compiling.add(compiling)
        compiling.add_done_callback(self._compiled)
        if self.is_ready:
            await asyncio.wait({compiling})
        return voice

    def _compiled(self, task: asyncio.Task) -> None:
        self._compiling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The first request in this voice compiles them.
            logger.warning("a voice's programs could not be compiled: %s", first_line(error))

    def _limited(self, request: Request) -> Request:
        """The request, limited to `Limits.speech_ms`. Raises `InputError` if it asks for more."""
        limit, wanted = self.settings.limits.speech_ms, request.max_audio_length_ms
        if wanted is not None and wanted > limit:
            raise InputError(f"max_audio_length_ms is {wanted:g}, but at most {limit:g} are spoken")
        needed = 1000 * (needed_seconds(request.spoken_text) + request.pause_seconds)
        default = self.model.config.default_max_audio_length_ms
        if wanted is None and max(default, needed) > limit:
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
    ) -> SpeechStream:
        """Encodes the context of a request, and submits it to the engine.

        Args:
          caller: sends the request; its share of the engine is used.
          stream: whether to deliver chunks during generation; otherwise only the whole.
          background: runs the request only in slots that no other request needs.
          wait: waits until the engine's queue has room.
          notices: those that arose before the request reached the engine.

        Raises:
          ApiError: the server is closing, or the caller has used up its seconds of speech.
          CSMError: as `Engine.submit`.
        """
        if self.is_closing:
            raise _closing()
        if not background:
            self.rate_limits.check_speech(caller)
        started = time.perf_counter()
        if any(turn.text is None for turn in request.context):
            notices = [*notices, NO_TRANSCRIPT]
        request = await self.encode_context(self._limited(request), caller)
        submission = _Submission(self.engine)
        words: list[Word] = []
        submit = functools.partial(
            submission.run,
            request,
            stream=stream,
            wait=wait,
            background=background,
            keep=False,
            share=caller.share,
            weight=caller.weight,
            on_word=words.append,
        )
        try:
            ticket = await self.threads.work(caller, submit)
        except asyncio.CancelledError:
            submission.cancel()
            raise
        is_charged = not background
        return SpeechStream(self, caller, ticket, words, stream, started, notices, is_charged)


def _closing() -> ApiError:
    return ApiError(503, "the server is closing", code="closing", retry_after=10)


class _Submission:
    """The submission of a request in a thread, which can be cancelled at any time."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._ticket: Ticket | None = None
        self._is_cancelled = False

    def run(self, request: Request, **options: Any) -> Ticket:
        self._ticket = ticket = self._engine.submit(request, **options)
        # One of the two threads sees what the other has set.
        if self._is_cancelled:
            ticket.cancel()
        return ticket

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._ticket is not None:
            self._ticket.cancel()


def _has_tenants(keys: Sequence[ApiKey]) -> bool:
    """Whether keys name several tenants; then a slot is kept free for tenants that use none."""
    return len({key.caller.owner for key in keys}) > 1


def _is_unencoded(turn: Segment) -> bool:
    return turn.codes is None and turn.audio is not None


def _ignore(notice: Notice) -> None:
    """Drops a notice, because `Engine.submit` plans the request again and reports it."""
