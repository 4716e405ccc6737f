"""OpenAI's API of chats, `POST /v1/chat/completions`, in which the assistant's messages are speech.

    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "csm-1b", "modalities": ["text", "audio"],
             "audio": {"voice": "slt", "format": "wav"},
             "messages": [{"role": "user", "content": "Hello."}]}'

The model does not think of answers. The last text of the last message is spoken, by the assistant;
the messages before it are the conversation so far, of two speakers. Recordings (`input_audio`) are
part of it, with the text of the same message as their transcript, and so is the speech of earlier
responses, by its id: `{"role": "assistant", "audio": {"id": ...}}`.
"""

import base64
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from pydantic import FailFast, Field, StrictInt

from csm_jax.inference.request import Notice, Request
from csm_jax.prompt.window import find_newest
from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.api.chat_messages import MAX_MESSAGES, Message, Script, Speakers, read_script
from csm_jax.serve.api.context import read_context
from csm_jax.serve.api.fields import AnyCase, Fields, ignored
from csm_jax.serve.api.model_names import check_model
from csm_jax.serve.api.openai import EVENTS, VOICES, VoiceId, name_of
from csm_jax.serve.api.parsing import describe, read_fields
from csm_jax.serve.api.responses import (
    NOTICES,
    PermitResponse,
    SpokenFile,
    cancel_on_disconnect,
    speak_streamed,
    speak_whole,
)
from csm_jax.serve.api.schemas import Options, find_speaker, make_request
from csm_jax.serve.api.spoken_turns import SpokenTurn, SpokenTurns
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import Service
from csm_jax.serve.speech_stream import SpeechStream

# OpenAI's name of it.
_PCM = "pcm16"


class AudioOptions(Fields):
    voice: str | StrictInt | VoiceId = Field(default="", description="as for /v1/audio/speech")
    format: Annotated[Literal["wav", "mp3", "flac", "opus", "aac", "pcm16", "pcm"], AnyCase] = "wav"


class StreamOptions(Fields):
    include_usage: bool = False


class Chat(Options):
    """The fields of OpenAI's API; sampling, seed and length go in `extra_body`."""

    model: str = Field("", max_length=256, description="another than the server's is not used")
    messages: Annotated[list[Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    modalities: list[Literal["text", "audio"]] | None = Field(
        None, max_length=2, description="if given, with audio: the model writes no texts"
    )
    audio: AudioOptions = AudioOptions()
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


@dataclass(frozen=True)
class Completion:
    """What all parts of a response have in common.

    Attributes:
      written: the text of the last message.
      text: that is spoken, which a normalizer may have changed.
      audio_id: by which later requests refer to the speech.
    """

    model: str
    written: str
    text: str
    caller: Caller
    audio_id: str = field(default_factory=SpokenTurns.new_id)
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        body = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return body | {"choices": choices} | more

    def keep(self, spoken: SpokenTurns, speech: SpeechStream) -> SpokenTurn:
        """Keeps the speech, so that later requests can refer to it."""
        owner, codes = self.caller.owner, speech.codes()
        return spoken.add(self.audio_id, owner, self.written, self.text, codes)

    def event(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        """A chunk of a streamed response."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _as_event(self.body("chat.completion.chunk", [choice]))


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    spoken = SpokenTurns()

    @routes.post("/chat/completions", openapi_extra=describe(Chat), response_class=Response)
    async def complete(http: HTTPRequest) -> Response:
        fields = await read_fields(http, Chat, recordings=True)
        work = _complete(service, spoken, caller_of(http), fields)
        return await cancel_on_disconnect(http, work)

    return routes


async def _complete(
    service: Service, spoken: SpokenTurns, caller: Caller, fields: Chat
) -> Response:
    if fields.modalities is not None and "audio" not in fields.modalities:
        message = 'modalities has no "audio", but this model only speaks: add it'
        raise ApiError(400, message, param="modalities")
    with await service.admit(caller) as permit:
        request, written, notices = await _read_request(service, spoken, caller, fields)
        completion = Completion(service.settings.model_name, written, request.spoken_text, caller)
        audio_format = "pcm" if fields.audio.format == _PCM else fields.audio.format
        if fields.stream:
            has_usage = fields.stream_options.include_usage
            wrap = functools.partial(_events, spoken, completion, has_usage)
            return await speak_streamed(
                service,
                permit,
                request,
                audio_format,
                wrap=wrap,
                media_type=EVENTS,
                notices=notices,
            )
        file = await speak_whole(service, caller, request, audio_format, notices=notices)
        kept = completion.keep(spoken, file.speech)
        write = functools.partial(_write, completion, file, kept.expires_at)
        content = await service.threads.work(caller, write)
        headers = {NOTICES: file.speech.notice_kinds}
        return PermitResponse(permit, content, media_type="application/json", headers=headers)


async def _read_request(
    service: Service, spoken: SpokenTurns, caller: Caller, fields: Chat
) -> tuple[Request, str, list[Notice]]:
    """Makes the request to the engine. Also returns its text as it is written, and notices."""
    notices = check_model(service.settings, fields.model)
    voice, number = find_speaker(service, caller, name_of(fields.audio.voice), VOICES)
    speakers = Speakers(user=0 if number else 1, assistant=number)
    script = read_script(
        fields.messages, speakers, functools.partial(spoken.find, owner=caller.owner)
    )
    turns, dropped = _newest(script, service.settings.limits.turns)
    has_voice = {number} if voice else set()
    context = await read_context(service, caller, turns, "input_audio", has_voice=has_voice)
    request = make_request(service, script.text, number, fields, context.turns, voice)
    notices += [*dropped, *context.notices, *ignored(_not_followed(fields, script))]
    return request, script.text, notices


def _write(completion: Completion, file: SpokenFile, expires_at: int) -> str:
    """The body of a response with a whole file."""
    audio = {"id": completion.audio_id, "expires_at": expires_at, "transcript": completion.text}
    audio["data"] = base64.b64encode(file.data).decode()
    message = {"role": "assistant", "content": None, "refusal": None, "audio": audio}
    reason = _reason(file.speech)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return json.dumps(completion.body("chat.completion", [choice], usage=_usage(file.speech)))


def _newest(script: Script, most: int) -> tuple[list[Any], list[Notice]]:
    """The turns that are read, `most` in all, and a notice if there are more."""
    kept = find_newest(script.turns, most)
    turns = [script.turns[i] for i in kept]
    if len(turns) == len(script.turns):
        return turns, []
    message = f"{len(script.turns) - len(turns)} of {len(script.turns)} turns were left out"
    return turns, [Notice("context_dropped", message)]


def _not_followed(fields: Chat, script: Script) -> list[str]:
    """The names of fields that do not change the speech, though their clients may think so."""
    parts = [part for message in fields.messages for part in message.content]
    nested = [*fields.messages, *parts, fields.audio]
    names = [*fields.unknown, *(name for each in nested for name in each.unknown)]
    return [*names, "instructions"] if script.has_instructions else names


async def _events(
    spoken: SpokenTurns,
    completion: Completion,
    has_usage: bool,
    speech: SpeechStream,
    pieces: AsyncIterator[bytes],
) -> AsyncIterator[bytes]:
    """The pieces of the file as the chunks of a streamed completion."""
    audio_id = completion.audio_id
    head = {"id": audio_id, "transcript": completion.text}
    yield completion.event({"role": "assistant", "content": None, "audio": head})
    async for piece in _in_threes(pieces):
        data = base64.b64encode(piece).decode()
        yield completion.event({"audio": {"id": audio_id, "data": data}})
    kept = completion.keep(spoken, speech)
    yield completion.event({"audio": {"id": audio_id, "expires_at": kept.expires_at}})
    yield completion.event({}, _reason(speech))
    if has_usage:
        usage = _usage(speech)
        yield _as_event(completion.body("chat.completion.chunk", [], usage=usage))
    yield b"data: [DONE]\n\n"


async def _in_threes(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces of a multiple of three, but for the last.

    So their base64 has no padding, and clients can join it before they decode it.
    """
    rest = b""
    async for piece in pieces:
        data = rest + piece
        size = len(data) // 3 * 3
        rest = data[size:]
        if size:
            yield data[:size]
    if rest:
        yield rest


def _reason(speech: SpeechStream) -> str:
    return "length" if "cut" in speech.notice_kinds.split(",") else "stop"


def _usage(speech: SpeechStream) -> dict[str, Any]:
    """The tokens of the text and the frames of the speech; those of the context do not count."""
    num_read, num_made = speech.num_tokens, speech.num_frames
    return {
        "prompt_tokens": num_read,
        "completion_tokens": num_made,
        "total_tokens": num_read + num_made,
        "prompt_tokens_details": {"text_tokens": num_read, "audio_tokens": 0, "cached_tokens": 0},
        "completion_tokens_details": {"text_tokens": 0, "audio_tokens": num_made},
    }


def _as_event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()
