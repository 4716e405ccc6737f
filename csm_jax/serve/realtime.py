"""A conversation over a WebSocket, `/v1/realtime`: text goes in, PCM comes out.

The client sends JSON, one object a message:

    {"type": "session", "voice": "slt", "speaker": 0, "temperature": 0.7, ...}   at any time
    {"type": "text", "text": "Hello, my na"}       what is to be said, also word by word
    {"type": "flush"}                               say what has come, though no sentence ended
    {"type": "turn", "speaker": 1, "text": "...", "audio": "<base64>"}    what the user said
    {"type": "cancel"}                              stop speaking now, and forget what waits

The server sends the speech as binary messages, 16-bit little-endian mono at 24 kHz, between

    {"type": "started", "id": 1, "text": "Hello, my name is Anna."}
    {"type": "done", "id": 1, "seconds": 1.6, "cancelled": false, "notices": ""}

and {"type": "session", ...} for what was set, {"type": "turn", "turns": 3} for what was heard,
{"type": "cancelled"} when it is silent, {"type": "error", "message": ...} for what was wrong;
after that the conversation goes on. Every turn is heard by those after it; of one that was
cancelled, what had been sent.
"""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from csm_jax.audio import to_pcm
from csm_jax.errors import CancelledError, CSMError
from csm_jax.prompt import Segment
from csm_jax.serve.caller import caller_of
from csm_jax.serve.errors import ApiError, as_api_error, as_bad_field
from csm_jax.serve.fields import Options, Speaker, Text, check_length, make_request, read_recording
from csm_jax.serve.service import Live, Service
from csm_jax.serve.voices import Voice
from csm_jax.text import take_sentences

# Sentences that may wait to be spoken.
MAX_WAITING = 256


class SetSession(Options):
    type: Literal["session"]
    voice: str | None = Field(None, max_length=64)
    speaker: Speaker | None = None


class AddText(BaseModel):
    type: Literal["text"]
    text: str


class Flush(BaseModel):
    type: Literal["flush"]


class AddTurn(BaseModel):
    type: Literal["turn"]
    speaker: Speaker
    text: Text
    audio: str | None = Field(None, description="base64")


class Cancel(BaseModel):
    type: Literal["cancel"]


_MESSAGE = TypeAdapter(
    Annotated[SetSession | AddText | Flush | AddTurn | Cancel, Field(discriminator="type")]
)


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Conversation"])

    @routes.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        async with Conversation(service, socket) as conversation:
            # Ends with the socket.
            while (message := await socket.receive())["type"] != "websocket.disconnect":
                await conversation.take(message.get("text") or "")

    return routes


class Conversation:
    """The turns so far, what is being said, and what waits to be."""

    def __init__(self, service: Service, socket: WebSocket):
        self._service = service
        self._socket = socket
        self._caller = caller_of(socket)
        self._options = Options()
        self._voice: Voice | None = None
        self._speaker = 0
        self._turns: list[Segment] = []
        self._unfinished = ""
        self._sentences: asyncio.Queue[str] = asyncio.Queue(MAX_WAITING)
        self._live: Live | None = None
        self._is_speaking = False
        self._num_started = 0
        # What was asked for before the last one is not to be heard.
        self._num_cancels = 0
        self._is_silent = asyncio.Event()
        self._is_silent.set()

    async def __aenter__(self) -> "Conversation":
        self._speaking = asyncio.create_task(self._speak_all())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._speaking.cancel()
        await asyncio.gather(self._speaking, return_exceptions=True)

    async def take(self, message: str) -> None:
        """Does what a message of the client asks for."""
        try:
            match _parse(message):
                case SetSession() as settings:
                    await self._set(settings)
                case AddText(text=text):
                    self._add(text)
                case Flush():
                    self._flush()
                case AddTurn() as turn:
                    await self._hear(turn)
                case Cancel():
                    await self._cancel()
        except (CSMError, ApiError) as error:
            await self._tell_error(error)

    async def _set(self, settings: SetSession) -> None:
        if settings.voice is not None:
            self._voice = self._service.voices.find(settings.voice, self._caller.owner)
            self._speaker = self._voice.speaker
        if settings.speaker is not None:
            self._speaker = settings.speaker
        given = settings.model_dump(exclude={"type", "voice", "speaker"}, exclude_none=True)
        self._options = self._options.model_copy(update=given)
        voice = self._voice.name if self._voice else None
        options = self._options.model_dump(exclude_none=True)
        await self._tell("session", voice=voice, speaker=self._speaker, **options)

    def _add(self, text: str) -> None:
        sentences, self._unfinished = take_sentences(self._unfinished + text)
        limit = self._service.settings.limits.text_characters
        if len(self._unfinished) > limit:
            self._unfinished = ""
            raise ApiError(400, f"more than {limit} characters without an end", code="too_long")
        for sentence in sentences:
            self._say(sentence)

    def _flush(self) -> None:
        rest, self._unfinished = self._unfinished.strip(), ""
        if rest:
            self._say(rest)

    def _say(self, sentence: str) -> None:
        if self._sentences.full():
            raise ApiError(429, f"{MAX_WAITING} sentences wait already", code="queue_full")
        self._is_silent.clear()
        self._sentences.put_nowait(sentence)

    async def _hear(self, turn: AddTurn) -> None:
        check_length(self._service, turn.text)
        codes = None
        if turn.audio is not None:
            audio = await read_recording(self._service, turn.audio, "audio")
            codes = await self._service.encode(audio)
        self._remember(Segment(turn.speaker, turn.text, codes=codes))
        await self._tell("turn", turns=len(self._turns))

    def _remember(self, turn: Segment) -> None:
        self._turns = [*self._turns, turn][-self._service.settings.limits.turns :]

    async def _cancel(self) -> None:
        self._num_cancels += 1
        self._unfinished = ""
        while not self._sentences.empty():
            self._sentences.get_nowait()
        if self._live is not None:
            self._live.cancel()
        if not self._is_speaking:
            self._is_silent.set()
        await self._is_silent.wait()
        if not self._speaking.done():
            await self._tell("cancelled")

    async def _speak_all(self) -> None:
        """Says one sentence after the other, until the socket is gone."""
        try:
            while True:
                self._is_speaking = False
                if self._sentences.empty():
                    self._is_silent.set()
                sentence = await self._sentences.get()
                self._is_speaking = True
                try:
                    await self._speak(sentence)
                except (CSMError, ApiError) as error:
                    await self._tell_error(error)
        except WebSocketDisconnect:
            pass
        finally:
            # Or who waits for silence would wait for ever.
            self._is_speaking = False
            self._is_silent.set()

    async def _speak(self, sentence: str) -> None:
        self._num_started += 1
        number, cancels, num_samples = self._num_started, self._num_cancels, 0
        request = make_request(
            self._service, sentence, self._speaker, self._options, self._turns, self._voice
        )
        self._live = live = await self._service.speak(request, self._caller, stream=True)
        try:
            await self._tell("started", id=number, text=sentence)
            async for chunk in live.chunks():
                if cancels != self._num_cancels:
                    break
                await self._socket.send_bytes(to_pcm(chunk))
                num_samples += len(chunk)
        except CancelledError:
            pass
        finally:
            live.cancel()
            self._live = None
        heard = live.codes_so_far()[: num_samples // self._service.model.codec.frame_size]
        self._remember(Segment(request.speaker, sentence, codes=heard))
        await self._tell(
            "done",
            id=number,
            seconds=round(num_samples / self._service.model.sample_rate, 3),
            cancelled=cancels != self._num_cancels,
            notices=live.notice_kinds,
        )

    async def _tell_error(self, error: Exception) -> None:
        told = as_api_error(error)
        await self._tell("error", message=str(told), code=told.code)

    async def _tell(self, kind: str, **fields: object) -> None:
        await self._socket.send_json({"type": kind, **fields})


def _parse(message: str) -> BaseModel:
    try:
        return _MESSAGE.validate_json(message)
    except ValidationError as error:
        raise as_bad_field(error) from error
