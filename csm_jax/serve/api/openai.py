"""OpenAI's API: `POST /v1/audio/speech` and `GET /v1/models`.

    curl localhost:8000/v1/audio/speech -H "Content-Type: application/json" \\
        -d '{"model": "csm-1b", "input": "Hello.", "voice": "alloy"}' -o hello.mp3
"""

import base64
import json
from collections.abc import AsyncIterator
from typing import Literal

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field

from csm_jax.inference.request import Request
from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.api.parsing import describe, read_fields
from csm_jax.serve.api.responses import cancel_on_disconnect, speak_streamed
from csm_jax.serve.api.schemas import Options, Text, make_named_request, make_request
from csm_jax.serve.audio.encoding import FormatName
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import Service
from csm_jax.serve.speech_stream import SpeechStream

# Names that OpenAI's clients use. A voice stands for the preset at its position in the sorted list,
# or, on a server without voices, for the speaker of that number.
VOICES = ["alloy", "ash", "ballad", "coral", "echo", "fable", "nova", "onyx", "sage", "shimmer"]
EVENTS = "text/event-stream"
MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")


class VoiceId(BaseModel):
    """A voice as an object, which newer clients send."""

    id: str = Field(max_length=64)


class Speech(Options):
    """The fields of OpenAI's API; sampling, seed and length go in `extra_body`."""

    model: str = Field(max_length=256)
    input: Text
    voice: str | VoiceId = Field(description="a name of /v1/audio/voices, OpenAI's, or a number")
    response_format: FormatName = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4.0)
    stream_format: Literal["audio", "sse"] = "audio"
    instructions: str | None = Field(None, description="not followed: the model has none")


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "sesame"
    sampling: Options = Field(description="for requests that do not say it; not of OpenAI's API")


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def router(service: Service) -> APIRouter:
    """The routes of OpenAI's API."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    names = (service.settings.model_name, *MODELS)
    default = Options.of(service.settings.sampling)

    @routes.post("/audio/speech", openapi_extra=describe(Speech), response_class=Response)
    async def speech(http: HTTPRequest) -> Response:
        fields = await read_fields(http, Speech)
        if fields.model not in names:
            raise _no_model(fields.model)
        return await cancel_on_disconnect(http, _speak(service, caller_of(http), fields))

    @routes.get("/models", response_model_exclude_none=True)
    def models() -> Models:
        return Models(data=[Model(id=service.settings.model_name, sampling=default)])

    @routes.get("/models/{name}", response_model_exclude_none=True)
    def model(name: str) -> Model:
        if name not in names:
            raise _no_model(name)
        return Model(id=name, sampling=default)

    return routes


async def _speak(service: Service, caller: Caller, fields: Speech) -> Response:
    audio_format, speed = fields.response_format, fields.speed
    with await service.admit(caller) as permit:
        request = as_request(service, caller, fields)
        if fields.stream_format == "sse":
            return await speak_streamed(
                service, permit, request, audio_format, speed, _events, EVENTS
            )
        response = await speak_streamed(service, permit, request, audio_format, speed)
    if fields.instructions:
        response.headers["X-Notices"] = "instructions_ignored"
    return response


def _no_model(name: str) -> ApiError:
    return ApiError(404, f"there is no model {name[:80]!r}", "model", "model_not_found")


def as_request(service: Service, caller: Caller, fields: Speech) -> Request:
    """Makes the request to the engine. Raises `InputError` and `ApiError`."""
    name = fields.voice if isinstance(fields.voice, str) else fields.voice.id
    is_known = service.voices.has(name, caller.owner)
    if not is_known and name.isdecimal() and len(name) < 10:
        return make_request(service, fields.input, int(name), fields)
    return make_named_request(service, caller, fields.input, name, VOICES, fields)


async def _events(speech: SpeechStream, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of the file as server-sent events."""
    async for piece in pieces:
        audio = base64.b64encode(piece).decode()
        yield _event({"type": "speech.audio.delta", "audio": audio})
    num_input, num_output = speech.num_tokens, speech.num_frames
    total = num_input + num_output
    usage = {"input_tokens": num_input, "output_tokens": num_output, "total_tokens": total}
    yield _event({"type": "speech.audio.done", "usage": usage})


def _event(data: dict) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()
