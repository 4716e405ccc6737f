"""DeepInfra's API: `POST /v1/inference/sesame/csm-1b`.

curl localhost:8000/v1/inference/sesame/csm-1b -F text="Hello." -F response_format=mp3
"""

import base64
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from csm_jax.inference.alignment.formats import word_rows
from csm_jax.inference.request import Request
from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.api.context import UploadedTurn, read_context
from csm_jax.serve.api.fields import AnyCase, ignored
from csm_jax.serve.api.parsing import describe, read_fields
from csm_jax.serve.api.responses import (
    NOTICES,
    PermitResponse,
    add_notices,
    cancel_on_disconnect,
    speak_whole,
)
from csm_jax.serve.api.schemas import Options, Recording, Text, make_named_request, make_request
from csm_jax.serve.api.words import WordEntry
from csm_jax.serve.audio.encoding import FORMATS
from csm_jax.serve.jobs.job import Job, JobHandler
from csm_jax.serve.middleware.request_log import request_id
from csm_jax.serve.service import Service

PATH = "/v1/inference/sesame/csm-1b"
PRESETS = ["conversational_a", "conversational_b", *(f"read_speech_{x}" for x in "abcd")]
NO_PRESET = "none"
_KIND = "deepinfra"


class Inference(Options):
    """The fields of DeepInfra's API; any voice of the server can be `preset_voice`."""

    text: Text
    response_format: Annotated[Literal["wav", "mp3", "opus", "flac", "pcm"], AnyCase] = "wav"
    preset_voice: str | None = Field(
        None, max_length=64, description='default: "none", unless the server has a default voice'
    )
    temperature: float | None = Field(0.9, ge=0, le=5)
    max_audio_length_ms: float | None = Field(10_000, ge=80, le=86_400_000)
    speaker_audio: Recording | None = Field(
        None, description="a voice to speak in: a file, or base64 in JSON"
    )
    speaker_transcript: str | None = Field(
        None, description="its transcript, without which the speech can be less clear"
    )
    webhook: str | None = Field(
        None, max_length=2048, description="URL that the response is posted to"
    )


class QueuedInference(BaseModel):
    """The stored body of a job: `name` is the id of the request."""

    name: str
    fields: Inference


Status = Literal["queued", "succeeded", "failed"]


class InferenceStatus(BaseModel):
    status: Status
    runtime_ms: int = 0
    cost: float = 0.0
    tokens_generated: int = Field(default=0, description="frames of 80 ms")
    tokens_input: int = Field(default=0, description="of the text")


class InferenceResponse(BaseModel):
    audio: str | None = Field(default=None, description="a data: URI")
    input_character_length: int
    output_format: str
    words: list[WordEntry] = Field(
        default=[], description="none if the checkpoint has no alignment heads"
    )
    request_id: str
    inference_status: InferenceStatus


def router(service: Service) -> APIRouter:
    """The routes of DeepInfra's API."""
    routes = APIRouter(tags=["DeepInfra"])

    async def run(job: Job, body: str) -> dict[str, Any]:
        queued = await service.threads.work(job.caller, QueuedInference.model_validate_json, body)
        with await service.admit(job.caller, wait=True):
            response, _ = await _speak(service, job.caller, queued.fields, queued.name)
        return response.model_dump()

    service.jobs.register(_KIND, JobHandler(run, _webhook_body, keeps_result=False))

    body = describe(Inference, forms=True)

    @routes.post(
        PATH,
        openapi_extra=body,
        response_model=InferenceResponse,
        responses={202: {"model": InferenceResponse}},
    )
    async def inference(http: HTTPRequest) -> Response:
        fields = await read_fields(http, Inference, recordings=True, forms=True)
        if fields.webhook:
            return await _submit_job(service, caller_of(http), fields, fields.webhook)
        return await cancel_on_disconnect(http, _respond(service, caller_of(http), fields))

    return routes


async def _respond(service: Service, caller: Caller, fields: Inference) -> PermitResponse:
    with await service.admit(caller) as permit:
        response, notices = await _speak(service, caller, fields, request_id())
        content = await service.threads.work(caller, response.model_dump_json)
        headers = {NOTICES: notices}
        return PermitResponse(permit, content, media_type="application/json", headers=headers)


async def _speak(
    service: Service, caller: Caller, fields: Inference, name: str
) -> tuple[InferenceResponse, str]:
    """Generates the speech of a request that has a permit. Also returns the kinds of notices."""
    request = await _request(service, caller, fields)
    started = time.perf_counter()
    notices = ignored(fields.unknown)
    spoken = await speak_whole(
        service, caller, request, fields.response_format, notices=notices, has_words=True
    )
    audio = await service.threads.work(caller, _data_uri, spoken.data, fields.response_format)
    response = InferenceResponse(
        audio=audio,
        input_character_length=len(fields.text),
        output_format=fields.response_format,
        words=[WordEntry(**row) for row in word_rows(spoken.words)],
        request_id=name,
        inference_status=InferenceStatus(
            status="succeeded",
            runtime_ms=round(1000 * (time.perf_counter() - started)),
            tokens_generated=spoken.speech.num_frames,
            tokens_input=spoken.speech.num_tokens,
        ),
    )
    return response, spoken.speech.notice_kinds


async def _submit_job(
    service: Service, caller: Caller, fields: Inference, webhook: str
) -> JSONResponse:
    """Submits a job, whose result is posted to the webhook, and responds that it is queued."""
    service.webhooks.check(webhook, caller)
    name = request_id()
    body = await service.threads.work(caller, _queued, name, fields)
    await service.jobs.submit(caller, _KIND, body, webhook)
    response = JSONResponse(_without_audio(fields, name, "queued").model_dump(), 202)
    add_notices(response, ignored(fields.unknown))
    return response


def _data_uri(data: bytes, audio_format: str) -> str:
    return f"data:{FORMATS[audio_format].media_type};base64,{base64.b64encode(data).decode()}"


def _queued(name: str, fields: Inference) -> str:
    """The body of a job, from which it can be run again."""
    if isinstance(fields.speaker_audio, bytes):
        audio = base64.b64encode(fields.speaker_audio).decode()
        fields = fields.model_copy(update={"speaker_audio": audio})
    return QueuedInference(name=name, fields=fields).model_dump_json()


def _webhook_body(job: Job, body: str) -> dict[str, Any]:
    """The body that is posted to a job's webhook."""
    if job.result is not None:
        return job.result
    queued = QueuedInference.model_validate_json(body)
    failed = _without_audio(queued.fields, queued.name, "failed").model_dump()
    return failed | (job.error.body if job.error else {})


def _without_audio(fields: Inference, name: str, status: Status) -> InferenceResponse:
    return InferenceResponse(
        input_character_length=len(fields.text),
        output_format=fields.response_format,
        request_id=name,
        inference_status=InferenceStatus(status=status),
    )


async def _request(service: Service, caller: Caller, fields: Inference) -> Request:
    if fields.speaker_audio is not None:
        turn = UploadedTurn(0, fields.speaker_transcript or "", fields.speaker_audio)
        context = await read_context(service, caller, [turn], "speaker_audio")
        return make_request(service, fields.text, 0, fields, context.turns)
    preset = fields.preset_voice or service.settings.default_voice or NO_PRESET
    if preset.casefold() == NO_PRESET and not service.voices.has(preset, caller.owner):
        return make_request(service, fields.text, 0, fields)
    return make_named_request(service, caller, fields.text, preset, PRESETS, fields)
