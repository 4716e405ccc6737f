"""A conversation over a WebSocket, `/v1/realtime`: text in, PCM out.

The client sends JSON, one object a message:

    {"type": "session", "voice": "slt", "speaker": 0, "temperature": 0.7, ...}   settings
    {"type": "text", "text": "Hello, my na"}       text to speak, which may be cut anywhere
    {"type": "flush"}                               speaks the text of an unfinished sentence
    {"type": "say", "text": "Hello. It's me.", "speaker": 1, "seed": 5, ...}     a whole turn
    {"type": "turn", "speaker": 1, "text": "...", "audio": "<base64>"}    a turn of the user
    {"type": "cancel", "id": 1, "audio_end_ms": 900}     stops the speech, and drops waiting text

The server sends the speech as binary messages, 16-bit little-endian mono at 24 kHz, between

    {"type": "started", "id": 1, "text": "Hello, my name is Anna."}
    {"type": "words", "id": 1, "words": [{"text": "Hello,", "start": 0.1, "end": 0.5, ...}]}
    {"type": "done", "id": 1, "seconds": 1.6, "cancelled": false, "notices": "", "text": "Hello..."}

`words` comes between the binary messages if the session has `"words": true`: the words whose times,
in seconds of the utterance, have become certain, in order.

Other messages are {"type": "session", ...} with the changed settings, {"type": "turn", "turns": 3}
after a turn was added, {"type": "cancelled"} after the speech has stopped, and {"type": "error",
"message": ...}, with the `id` of the utterance that failed; the conversation continues after it.

Every turn is context for those after it; of one that was cancelled, the words that were heard. What
was sent counts as heard, unless `cancel` tells how much of which utterance was played: then later
utterances were not heard at all, though they may have been sent. `done` and `cancelled` have the
`text` that stays; a turn of which no word was heard is forgotten.

`text` is spoken sentence by sentence, `say` as one turn. Both are numbered in the order of arrival.
The fields of a session are optional; `"voice": null` removes the voice. A `say` has the same
fields, which hold for that turn only. A `turn` has a text, a recording, or both.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.websockets import WebSocket, WebSocketDisconnect

from csm_jax.errors import CSMError, RequestCancelledError
from csm_jax.inference.alignment.formats import word_rows
from csm_jax.io.audio import to_pcm
from csm_jax.prompt.splitting import Sentences
from csm_jax.prompt.turns import Segment, check_text
from csm_jax.serve.admission.caller import caller_of
from csm_jax.serve.api.parsing import parse_json
from csm_jax.serve.api.realtime_messages import (
    MESSAGE,
    AddText,
    AddTurn,
    Cancel,
    Change,
    Flush,
    Say,
    SetSession,
    Utterance,
    UtteranceSettings,
)
from csm_jax.serve.api.schemas import check_length, make_request, read_recording
from csm_jax.serve.api.turn_history import SpokenTurn, TurnHistory
from csm_jax.serve.api.websocket import message_budget, serve_messages
from csm_jax.serve.api.words import NO_WORDS
from csm_jax.serve.errors import TRY_AGAIN_LATER, ApiError, ClientGoneError, as_api_error
from csm_jax.serve.service import Service
from csm_jax.serve.speech_stream import SpeechStream

# Utterances that may wait, and their characters in total.
MAX_WAITING = 256
MAX_WAITING_CHARACTERS = 100_000
# Bytes of the reason of a WebSocket close.
MAX_REASON = 120


def router(service: Service) -> APIRouter:
    """The route of conversations."""
    routes = APIRouter(tags=["Conversation"])
    limits = service.settings.limits
    budget = message_budget(limits)

    @routes.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        caller = caller_of(socket)
        try:
            with service.socket_limiter.opened(caller):
                async with RealtimeSession(service, socket) as session:
                    await serve_messages(socket, session, limits, budget, caller.share)
        except ApiError as error:
            with contextlib.suppress(WebSocketDisconnect):
                await socket.send_json(_as_message(error))
                await socket.close(TRY_AGAIN_LATER, str(error)[:MAX_REASON])

    return routes


class RealtimeSession:
    """The state of one WebSocket: earlier turns, the current utterance, and waiting ones."""

    def __init__(self, service: Service, socket: WebSocket):
        self._service = service
        self._socket = socket
        self._caller = caller_of(socket)
        self._settings = UtteranceSettings()
        self._history = TurnHistory(service, self._caller)
        self._unfinished = Sentences()
        self._waiting: asyncio.Queue[Utterance] = asyncio.Queue(MAX_WAITING)
        self._num_waiting_characters = 0
        self._speech: SpeechStream | None = None
        self._is_speaking = False
        # The number of the last utterance, and of the last that began.
        self._last_id = self._begun_id = 0
        # Utterances that began before the last cancel are not sent.
        self._num_cancels = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> "RealtimeSession":
        self._speaking = asyncio.create_task(self._speak_all())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._speaking.cancel()
        await asyncio.gather(self._speaking, return_exceptions=True)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being spoken or waits for that."""
        return self._idle.is_set()

    async def wait_until_ended(self) -> None:
        """Returns when nothing can be sent any more, because the client does not read."""
        await asyncio.wait({self._speaking})

    async def handle(self, message: bytes | None) -> None:
        """Handles a message of the client; None is a binary one, which is an error."""
        try:
            match await self._parse(message):
                case SetSession() as change:
                    await self._set(change)
                case AddText(text=text):
                    self._add_text(text)
                case Flush():
                    self._flush()
                case Say() as turn:
                    await self._say_turn(turn)
                case AddTurn() as turn:
                    await self._add_turn(turn)
                case Cancel() as cancel:
                    await self._cancel(cancel)
        except (CSMError, ApiError) as error:
            await self._send_error(error)

    async def _parse(self, message: bytes | None) -> BaseModel:
        if message is None:
            raise ApiError(400, "a message is JSON, sent as text", code="bad_message")
        return await parse_json(MESSAGE, message, self._service.settings.limits)

    async def _set(self, change: SetSession) -> None:
        self._settings = settings = self._changed(change)
        voice = settings.voice.name if settings.voice else None
        options = settings.options.model_dump(exclude_none=True)
        fields = {"voice": voice, "speaker": settings.speaker, "words": settings.words}
        await self._send_event("session", **fields, **options)

    def _changed(self, change: Change) -> UtteranceSettings:
        return self._settings.changed(change, self._service.voices, self._caller.owner)

    def _add_text(self, text: str) -> None:
        check_length(self._service, text)
        sentences = self._unfinished.add(text)
        limit = self._service.settings.limits.text_characters
        if len(self._unfinished) > limit:
            self._unfinished = Sentences()
            raise ApiError(400, f"more than {limit} characters without an end", code="too_long")
        for sentence in sentences:
            self._say(sentence)

    def _flush(self) -> None:
        if rest := self._unfinished.take_rest():
            self._say(rest)

    async def _say_turn(self, turn: Say) -> None:
        self._flush()
        number = self._last_id + 1
        try:
            self._say(turn.text, self._changed(turn))
        except (CSMError, ApiError) as error:
            self._last_id = number
            await self._send_error(error, id=number)

    def _say(self, text: str, settings: UtteranceSettings | None = None) -> None:
        """Queues an utterance. Raises `ApiError` or `InputError` if it cannot be spoken."""
        check_length(self._service, text)
        check_text(text)
        num_characters = self._num_waiting_characters + len(text)
        if self._waiting.full() or num_characters > MAX_WAITING_CHARACTERS:
            message = (
                f"{self._waiting.qsize()} sentences of {self._num_waiting_characters} characters "
                f"wait already, and at most {MAX_WAITING} of {MAX_WAITING_CHARACTERS} may"
            )
            raise ApiError(429, message, code="queue_full")
        self._service.rate_limits.count(self._caller)
        self._idle.clear()
        self._last_id += 1
        self._num_waiting_characters = num_characters
        self._waiting.put_nowait(Utterance(self._last_id, text, settings or self._settings))

    async def _add_turn(self, turn: AddTurn) -> None:
        if turn.text is not None or turn.audio is None:
            check_text(turn.text or "")
            check_length(self._service, turn.text or "")
        codes = None
        if turn.audio is not None:
            with await self._service.admit(self._caller):
                audio = await read_recording(self._service, turn.audio, "audio", self._caller)
                codes = await self._service.encode(audio, self._caller)
        await self._history.add(Segment(turn.speaker, turn.text, codes=codes))
        await self._send_event("turn", turns=len(self._history))

    async def _cancel(self, cancel: Cancel) -> None:
        self._num_cancels += 1
        number = self._begun_id if cancel.id is None else cancel.id
        self._unfinished = Sentences()
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._num_waiting_characters = 0
        if self._speech is not None:
            self._speech.cancel()
        if not self._is_speaking:
            self._idle.set()
        await self._idle.wait()
        if self._speaking.done():
            return
        if cancel.audio_end_ms is None:
            await self._send_event("cancelled")
            return
        if number > self._last_id:
            raise ApiError(400, f"there is no utterance {number} yet", param="id")
        text = await self._history.cut(number, cancel.audio_end_ms / 1000)
        await self._send_event("cancelled", id=number, text=text)

    async def _speak_all(self) -> None:
        """Speaks the waiting utterances one by one, until the socket is closed."""
        try:
            while True:
                self._is_speaking = False
                if self._waiting.empty():
                    self._idle.set()
                utterance = await self._waiting.get()
                self._num_waiting_characters -= len(utterance.text)
                self._is_speaking, self._begun_id = True, utterance.id
                try:
                    await self._speak(utterance, self._num_cancels)
                except (CSMError, ApiError) as error:
                    await self._send_error(error, id=utterance.id)
        except (WebSocketDisconnect, ClientGoneError):
            pass
        finally:
            # `_cancel` may be waiting for it.
            self._is_speaking = False
            self._idle.set()

    async def _speak(self, utterance: Utterance, num_cancels: int) -> None:
        """Speaks an utterance.

        Args:
          num_cancels: `_num_cancels` when the utterance began; after one more it is not sent.
        """
        text, settings = utterance.text, utterance.settings
        turns = self._history.turns
        request = make_request(
            self._service, text, settings.speaker, settings.options, turns, settings.voice
        )
        with await self._service.admit(self._caller):
            has_no_words = settings.words and self._service.model.alignment is None
            notices = [NO_WORDS] if has_no_words else []
            self._speech = await self._service.speak(
                request, self._caller, stream=True, notices=notices
            )
            try:
                if num_cancels != self._num_cancels:
                    return
                with self._speech.sending():
                    await self._send_speech(utterance, self._speech, num_cancels)
            finally:
                self._speech.cancel()
                self._speech = None

    async def _send_speech(
        self, utterance: Utterance, speech: SpeechStream, num_cancels: int
    ) -> None:
        num_samples = 0
        with contextlib.suppress(RequestCancelledError):
            await self._send_event("started", id=utterance.id, text=utterance.text)
            async for chunk in speech.chunks():
                if num_cancels != self._num_cancels:
                    break
                await self._send(self._socket.send_bytes(to_pcm(chunk)))
                num_samples += len(chunk)
                await self._send_words(utterance, speech)
        is_cancelled = num_cancels != self._num_cancels
        if not is_cancelled:
            await self._send_words(utterance, speech)
        seconds = num_samples / self._service.model.sample_rate
        kept = await self._remember(utterance, speech, num_samples, is_cancelled)
        await self._send_event(
            "done",
            id=utterance.id,
            seconds=round(seconds, 3),
            cancelled=is_cancelled,
            notices=speech.notice_kinds,
            text=kept.text if kept else "",
        )

    async def _send_words(self, utterance: Utterance, speech: SpeechStream) -> None:
        """Sends the words that have become certain, if the client wants them."""
        if utterance.settings.words and (words := speech.take_words()):
            await self._send_event("words", id=utterance.id, words=word_rows(words))

    async def _remember(
        self, utterance: Utterance, speech: SpeechStream, num_samples: int, is_cancelled: bool
    ) -> SpokenTurn | None:
        """Adds an utterance to the history; of a cancelled one, what was heard if what was sent
        was. Returns what it has added."""
        model = self._service.model
        codes = speech.codes_so_far()[: num_samples // model.codec.frame_size]
        turn: SpokenTurn | None = SpokenTurn(
            utterance.id,
            utterance.settings.speaker,
            speech.text,
            codes,
            tuple(speech.words_so_far) if speech.has_words else None,
        )
        if is_cancelled:
            turn = turn.heard(num_samples / model.sample_rate, model.config.frame_ms / 1000)
        if turn is not None:
            await self._history.add_spoken(turn)
        return turn

    async def _send_error(self, error: Exception, **fields: object) -> None:
        await self._send(self._socket.send_json(_as_message(error) | fields))

    async def _send_event(self, kind: str, **fields: object) -> None:
        await self._send(self._socket.send_json({"type": kind, **fields}))

    async def _send(self, sending: Coroutine[Any, Any, None]) -> None:
        """Sends a message. Raises `WebSocketDisconnect`, also for a client that does not read."""
        try:
            async with asyncio.timeout(self._service.settings.limits.write_seconds):
                await sending
        except TimeoutError as error:
            raise WebSocketDisconnect(TRY_AGAIN_LATER) from error


def _as_message(error: Exception) -> dict[str, Any]:
    known = as_api_error(error)
    return {"type": "error", "message": str(known), "code": known.code, "param": known.param}
