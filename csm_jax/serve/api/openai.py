"""OpenAI's API of speech: `POST /v1/audio/speech` and `GET /v1/models`.

    curl localhost:8000/v1/audio/speech -H "Content-Type: application/json" \\
        -d '{"model": "csm-1b", "input": "Hello.", "voice": "alloy"}' -o hello.mp3

A WAV file is sent when it is finished, with its length in its head, unless the client asks for a
stream by `stream`, by `stream_format`, or as OpenAI's own client does. Files of other formats need
no length, so they are sent during generation, unless `stream` is false.

With `"stream_format": "sse"` and `"words": true`, each event has the words whose times have become
certain, the last ones in `speech.audio.done`: {"type": "speech.audio.delta", "audio": ...,
"words": [{"text": "three", "start": 0.1, "end": 0.42, "confidence": 0.97}]}.
"""

import base64
import functools
import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field, StrictInt

from csm_jax.inference.alignment.formats import word_rows
from csm_jax.inference.request import Notice, Request
from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.api.context import Context, UploadedTurn, fetch_recording, read_context
from csm_jax.serve.api.fields import AnyCase, Fields, ignored
from csm_jax.serve.api.model_names import check_model, is_model, no_model
from csm_jax.serve.api.parsing import describe, read_fields
from csm_jax.serve.api.responses import cancel_on_disconnect, speak_file, speak_streamed
from csm_jax.serve.api.schemas import (
    Options,
    Recording,
    Text,
    find_speaker,
    is_default,
    is_number,
    make_request,
)
from csm_jax.serve.api.words import NO_WORDS, at_speed
from csm_jax.serve.audio.encoding import FormatName
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import Service
from csm_jax.serve.speech_stream import SpeechStream

# Names that OpenAI's clients use. A voice stands for the preset at its position in this list, or,
# on a server without voices, for the speaker of that number. New names are added at the end, so
# that the others keep their voices.
VOICES = ["alloy", "ash", "ballad", "coral", "echo", "fable", "nova", "onyx", "sage", "shimmer"]
VOICES += ["verse", "marin", "cedar"]
EVENTS = "text/event-stream"
# A recording that is fetched; base64 has no colon.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# A header of OpenAI's client, and its value in a request whose response is read as a stream.
_RAW_RESPONSE, _STREAMED = "x-stainless-raw-response", "stream"


class VoiceId(Fields):
    """A voice as an object, which newer clients send."""

    id: str = Field(max_length=64)


def name_of(voice: str | int | VoiceId) -> str:
    """The name of a voice, in all forms that clients send."""
    return voice.id if isinstance(voice, VoiceId) else str(voice)


class Speech(Options):
    """The fields of OpenAI's API; sampling, seed and length go in `extra_body`."""

    model: str = Field("", max_length=256, description="another than the server's is not used")
    input: Text
    voice: str | StrictInt | VoiceId = Field(
        "", description='a name of /v1/audio/voices, OpenAI\'s, a number, or "default"'
    )
    response_format: Annotated[FormatName, AnyCase] = "mp3"
    speed: float = Field(1.0, ge=0.25, le=4.0)
    stream: bool | None = Field(None, description="not of OpenAI's API")
    stream_format: Annotated[Literal["audio", "sse"], AnyCase] | None = Field(
        None, description='default: "audio"'
    )
    words: bool = Field(
        False, description="with events, when each word is spoken; not of OpenAI's API"
    )
    instructions: str | None = Field(None, description="not followed: the model has none")
    ref_audio: Recording | None = Field(
        None, description="a voice to speak in, base64 or a data: URI; not of OpenAI's API"
    )
    ref_text: str | None = Field(None, description="its transcript")

    @property
    def voice_name(self) -> str:
        return name_of(self.voice)

    @property
    def is_streamed(self) -> bool:
        """Whether the response is sent during generation, as far as the fields say it."""
        if self.stream is None:
            return self.stream_format is not None or self.response_format != "wav"
        return self.stream


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "sesame"
    sampling: Options = Field(description="for requests that do not say it; not of OpenAI's API")


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class NamedModel(BaseModel):
    id: str
    name: str


class NamedModels(BaseModel):
    models: list[NamedModel]


def router(service: Service) -> APIRouter:
    """The routes of OpenAI's API."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    settings = service.settings
    default = Options.of(settings.sampling)

    @routes.post("/audio/speech", openapi_extra=describe(Speech), response_class=Response)
    async def speech(http: HTTPRequest) -> Response:
        fields = await read_fields(http, Speech, recordings=True)
        is_streamed = fields.is_streamed
        if fields.stream is None and http.headers.get(_RAW_RESPONSE) == _STREAMED:
            is_streamed = True
        work = _speak(service, caller_of(http), fields, is_streamed)
        return await cancel_on_disconnect(http, work)

    @routes.get("/models", response_model_exclude_none=True)
    def models() -> Models:
        return Models(data=[Model(id=settings.model_name, sampling=default)])

    @routes.get("/models/{name}", response_model_exclude_none=True)
    def model(name: str) -> Model:
        if not is_model(settings, name):
            raise no_model(settings, name)
        return Model(id=name, sampling=default)

    @routes.get("/models/{owner}/{name}", response_model_exclude_none=True)
    def model_of_owner(owner: str, name: str) -> Model:
        return model(f"{owner}/{name}")

    @routes.get("/audio/models")
    def named_models() -> NamedModels:
        """The models in the form that Open WebUI lists."""
        name = settings.model_name
        return NamedModels(models=[NamedModel(id=name, name=name)])

    return routes


async def _speak(service: Service, caller: Caller, fields: Speech, is_streamed: bool) -> Response:
    audio_format, speed = fields.response_format, fields.speed
    if fields.stream_format == "sse" and not is_streamed:
        message = 'stream is false, but stream_format is "sse": leave out one of them'
        raise ApiError(400, message, param="stream_format")
    with await service.admit(caller) as permit:
        request, notices = await as_request(service, caller, fields)
        if not is_streamed:
            return await speak_file(service, permit, request, audio_format, speed, notices)
        if fields.stream_format != "sse":
            return await speak_streamed(
                service, permit, request, audio_format, speed, notices=notices
            )
        if fields.words and service.model.alignment is None:
            notices = [*notices, NO_WORDS]
        wrap = functools.partial(_events, speed if fields.words else None)
        return await speak_streamed(
            service, permit, request, audio_format, speed, wrap, EVENTS, notices
        )


async def as_request(
    service: Service, caller: Caller, fields: Speech
) -> tuple[Request, Sequence[Notice]]:
    """Makes the request to the engine, and notices of what it does not follow.

    Raises:
      ApiError, InputError: a value cannot be used.
    """
    notices = check_model(service.settings, fields.model)
    if fields.ref_audio is None:
        voice, number = find_speaker(service, caller, fields.voice_name, VOICES)
        request = make_request(service, fields.input, number, fields, voice=voice)
    else:
        context = await _read_reference(service, caller, fields, fields.ref_audio)
        speaker = context.turns[0].speaker
        request = make_request(service, fields.input, speaker, fields, context.turns)
    return request, [*notices, *ignored([*fields.unknown, *_not_followed(fields)])]


def _not_followed(fields: Speech) -> list[str]:
    """The names of fields that are known, but do not change the speech of this request."""
    names = ["instructions"] if fields.instructions else []
    if fields.words and fields.stream_format != "sse":
        names.append("words")
    if fields.ref_audio is None:
        return [*names, "ref_text"] if fields.ref_text else names
    is_named = not (is_number(fields.voice_name) or is_default(fields.voice_name))
    return [*names, "voice"] if is_named else names


async def _read_reference(
    service: Service, caller: Caller, fields: Speech, recording: str | bytes
) -> Context:
    """Decodes the recording whose voice is to speak, as a turn of the speaker in `voice`."""
    name = fields.voice_name
    turn = UploadedTurn(int(name) if is_number(name) else 0, fields.ref_text or "", recording)
    fetch = functools.partial(fetch_recording, service, caller, "ref_audio")
    is_address = isinstance(recording, str) and _ADDRESS.match(recording) is not None
    return await read_context(service, caller, [turn], "ref_audio", fetch if is_address else None)


async def _events(
    word_speed: float | None, speech: SpeechStream, pieces: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """The pieces of the file as server-sent events.

    Args:
      word_speed: the speed of the speech, if its words are wanted.
    """
    async for piece in pieces:
        audio = base64.b64encode(piece).decode()
        yield _event({"type": "speech.audio.delta", "audio": audio} | _words(speech, word_speed))
    num_input, num_output = speech.num_tokens, speech.num_frames
    total = num_input + num_output
    usage = {"input_tokens": num_input, "output_tokens": num_output, "total_tokens": total}
    yield _event({"type": "speech.audio.done", "usage": usage} | _words(speech, word_speed))


def _words(speech: SpeechStream, speed: float | None) -> dict[str, Any]:
    """A field with the words that have become certain, if there are any."""
    words = [] if speed is None else word_rows(at_speed(speech.take_words(), speed))
    return {"words": words} if words else {}


def _event(data: dict) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()
