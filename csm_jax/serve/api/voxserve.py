"""VoxServe's API: `POST /generate`.

curl -F text="Hello." -F speaker=0 -F streaming=true localhost:8000/generate | ffplay -
"""

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from pydantic import Field

from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.api.context import Context, UploadedTurn, read_context
from csm_jax.serve.api.fields import ignored
from csm_jax.serve.api.parsing import describe, read_fields
from csm_jax.serve.api.responses import cancel_on_disconnect, speak_file, speak_streamed
from csm_jax.serve.api.schemas import Options, Recording, Speaker, Text, make_request
from csm_jax.serve.service import Service


class Generate(Options):
    """The fields of VoxServe's API, and besides a voice and `Options`."""

    text: Text
    speaker: Speaker = 0
    streaming: bool = False
    voice: str | None = Field(None, max_length=64, description="a name of /v1/audio/voices")
    audio: Recording | None = Field(
        None, description="an earlier turn of the same speaker: a file, or base64 in JSON"
    )
    audio_text: str | None = Field(
        None, description="its transcript, without which the speech can be less clear"
    )


def router(service: Service) -> APIRouter:
    """The routes of VoxServe's API."""
    routes = APIRouter(tags=["VoxServe"])

    @routes.post("/generate", openapi_extra=describe(Generate, forms=True), response_class=Response)
    async def generate(http: HTTPRequest) -> Response:
        fields = await read_fields(http, Generate, recordings=True, forms=True)
        return await cancel_on_disconnect(http, _speak(service, caller_of(http), fields))

    return routes


async def _speak(service: Service, caller: Caller, fields: Generate) -> Response:
    with await service.admit(caller) as permit:
        context = await _context(service, caller, fields)
        voice = service.voices.find(fields.voice, caller.owner) if fields.voice else None
        request = make_request(service, fields.text, fields.speaker, fields, context.turns, voice)
        notices = [*context.notices, *ignored(fields.unknown)]
        if fields.streaming:
            return await speak_streamed(service, permit, request, "wav", notices=notices)
        return await speak_file(service, permit, request, "wav", notices=notices)


async def _context(service: Service, caller: Caller, fields: Generate) -> Context:
    if fields.audio is None:
        return Context()
    turn = UploadedTurn(fields.speaker, fields.audio_text or "", fields.audio)
    return await read_context(service, caller, [turn], "audio")
