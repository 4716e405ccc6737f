"""ElevenLabs' API: `POST /v1/text-to-speech/{voice_id}`, with the time of each character on demand.

    curl "localhost:8000/v1/text-to-speech/slt/with-timestamps?output_format=mp3_44100_128" \\
        -H "Content-Type: application/json" -d '{"text": "three one four"}'

`/stream` sends the file during generation, and `/stream/with-timestamps` a JSON object a line.
`alignment` has the characters of the text, `normalized_alignment` those of the text as it is
spoken; joined over the lines of a stream, they are the whole text.
"""

import base64
import functools
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Response
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field

from csm_jax.inference.request import Notice, Request
from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.api.character_times import Alignments, TextTimes
from csm_jax.serve.api.fields import Fields, ignored
from csm_jax.serve.api.model_names import check_model
from csm_jax.serve.api.parsing import describe, read_fields
from csm_jax.serve.api.responses import (
    NOTICES,
    PermitResponse,
    SpokenFile,
    cancel_on_disconnect,
    speak_file,
    speak_streamed,
    speak_whole,
)
from csm_jax.serve.api.schemas import Options, Text, make_named_request
from csm_jax.serve.api.words import NO_WORDS, at_speed
from csm_jax.serve.audio.encoding import RATED_FORMATS
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import Service
from csm_jax.serve.speech_stream import SpeechStream

# Voices of ElevenLabs that its users' programs name: George, Rachel, Antoni and Sarah. As for
# OpenAI's, each stands for the preset at its position.
VOICES = ["JBFqnCBsd6RMkjVDRZzb", "21m00Tcm4TlvDq8ikWAM"]
VOICES += ["ErXwobaYiN019PkySvjV", "EXAVITQu4vr4xnSDxMaL"]
VOICES = [name.lower() for name in VOICES]
LINES = "application/x-ndjson"
Format = Annotated[str, Query(description=f"one of {', '.join(RATED_FORMATS)}")]


class VoiceSettings(Fields):
    speed: float = Field(default=1.0, ge=0.25, le=4.0)


class TextToSpeech(Options):
    """The fields of ElevenLabs' API, and besides `Options`."""

    text: Text
    model_id: str = Field("", max_length=256, description="another than the server's is not used")
    voice_settings: VoiceSettings = VoiceSettings()


class VoiceEntry(BaseModel):
    voice_id: str = Field(description="the same as the name")
    name: str
    category: str
    labels: dict[str, str] = {}


class VoiceList(BaseModel):
    voices: list[VoiceEntry]
    has_more: bool = False
    total_count: int


class _Call(NamedTuple):
    """A request that was read and not yet admitted."""

    caller: Caller
    voice_id: str
    fields: TextToSpeech
    form: str

    @property
    def speed(self) -> float:
        return self.fields.voice_settings.speed


def router(service: Service) -> APIRouter:
    """The routes of ElevenLabs' API."""
    routes = APIRouter(tags=["ElevenLabs"])
    body = describe(TextToSpeech)

    def add(suffix: str, speak: Callable[[Service, _Call], Coroutine[Any, Any, Response]]) -> None:
        path = f"/v1/text-to-speech/{{voice_id}}{suffix}"

        @routes.post(path, openapi_extra=body, response_class=Response)
        async def text_to_speech(
            http: HTTPRequest, voice_id: str, output_format: Format = "mp3_44100_128"
        ) -> Response:
            call = await _read(http, voice_id, output_format)
            return await cancel_on_disconnect(http, speak(service, call))

    add("", _convert)
    add("/stream", _stream)
    add("/with-timestamps", _convert_with_timestamps)
    add("/stream/with-timestamps", _stream_with_timestamps)

    @routes.get("/v1/voices")
    @routes.get("/v2/voices")
    def voices(http: HTTPRequest) -> VoiceList:
        visible = service.voices.visible_to(caller_of(http).owner)
        entries = [
            VoiceEntry(
                voice_id=voice.name,
                name=voice.name,
                category="cloned" if voice.is_own else "premade",
            )
            for voice in visible
        ]
        return VoiceList(voices=entries, total_count=len(entries))

    return routes


async def _read(http: HTTPRequest, voice_id: str, output_format: str) -> _Call:
    fields = await read_fields(http, TextToSpeech)
    if output_format not in RATED_FORMATS:
        known = ", ".join(RATED_FORMATS)
        message = f"output_format is {output_format[:80]!r}, but must be one of {known}"
        raise ApiError(400, message, param="output_format", code="unsupported_output_format")
    return _Call(caller_of(http), voice_id, fields, output_format)


def _check_alignment(service: Service) -> None:
    """Raises `ApiError` if nothing tells when characters are spoken: a client that asks for it
    relies on it."""
    if service.model.alignment is None:
        raise ApiError(400, NO_WORDS.message, code=NO_WORDS.kind)


def _request(service: Service, call: _Call) -> tuple[Request, list[Notice]]:
    """Makes the request to the engine, and notices of what it does not follow."""
    fields = call.fields
    notices = check_model(service.settings, fields.model_id)
    notices += ignored([*fields.unknown, *fields.voice_settings.unknown])
    request = make_named_request(service, call.caller, fields.text, call.voice_id, VOICES, fields)
    return request, notices


async def _convert(service: Service, call: _Call) -> Response:
    with await service.admit(call.caller) as permit:
        request, notices = _request(service, call)
        return await speak_file(service, permit, request, call.form, call.speed, notices)


async def _stream(service: Service, call: _Call) -> Response:
    with await service.admit(call.caller) as permit:
        request, notices = _request(service, call)
        return await speak_streamed(
            service, permit, request, call.form, call.speed, notices=notices
        )


async def _convert_with_timestamps(service: Service, call: _Call) -> Response:
    _check_alignment(service)
    with await service.admit(call.caller) as permit:
        request, notices = _request(service, call)
        spoken = await speak_whole(
            service, call.caller, request, call.form, call.speed, notices=notices, has_words=True
        )
        times = TextTimes(call.fields.text, request.spoken_text)
        content = await service.threads.work(call.caller, _write, spoken, times)
        headers = {NOTICES: spoken.speech.notice_kinds}
        return PermitResponse(permit, content, media_type="application/json", headers=headers)


async def _stream_with_timestamps(service: Service, call: _Call) -> Response:
    _check_alignment(service)
    with await service.admit(call.caller) as permit:
        request, notices = _request(service, call)
        times = TextTimes(call.fields.text, request.spoken_text)
        wrap = functools.partial(_lines, times, call.speed)
        return await speak_streamed(
            service, permit, request, call.form, call.speed, wrap, LINES, notices
        )


def _write(spoken: SpokenFile, times: TextTimes) -> str:
    times.add(spoken.words, is_over=True)
    return _with_audio(spoken.data, times.take())


async def _lines(
    times: TextTimes, speed: float, speech: SpeechStream, pieces: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """The pieces of the file with the characters that have become certain, a line each."""
    async for piece in pieces:
        times.add(at_speed(speech.take_words(), speed), is_over=False)
        yield f"{_with_audio(piece, times.take())}\n".encode()
    times.add(at_speed(speech.take_words(), speed), is_over=True)
    if any((rest := times.take()).values()):
        yield f"{_with_audio(b'', rest)}\n".encode()


def _with_audio(data: bytes, alignments: Alignments) -> str:
    return json.dumps({"audio_base64": base64.b64encode(data).decode(), **alignments})
