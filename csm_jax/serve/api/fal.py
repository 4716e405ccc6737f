"""fal's API: `POST /fal-ai/csm-1b`, and the same behind a queue, as `fal-client` uses it.

    FAL_RUN_HOST=localhost:8000 FAL_QUEUE_RUN_HOST=localhost:8000/queue FAL_KEY=... python ...

The client uses https only, so the server needs a certificate.
"""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, FailFast, Field
from starlette.types import Receive, Scope, Send

from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.admission.concurrency import StreamLimiter
from csm_jax.serve.api.context import UploadedTurn, fetch_recording, read_context
from csm_jax.serve.api.fields import Fields, ignored
from csm_jax.serve.api.parsing import describe, read_fields
from csm_jax.serve.api.responses import add_notices, cancel_on_disconnect
from csm_jax.serve.api.scene import SceneLine, speak_scene
from csm_jax.serve.api.schemas import Options, Speaker, Text
from csm_jax.serve.audio.encoding import FORMATS, encode
from csm_jax.serve.errors import ApiError
from csm_jax.serve.jobs.job import Job, JobHandler, Status
from csm_jax.serve.jobs.runner import JobRunner
from csm_jax.serve.middleware.request_log import request_id
from csm_jax.serve.service import Service
from csm_jax.serve.settings import Limits

APP = "fal-ai/csm-1b"
_KIND = "fal"
# Of a result; the JavaScript client reads it.
_REQUEST_ID = "x-fal-request-id"
# Lines, and turns of context, that are parsed. `Limits.turns` of a server can only be lower.
MAX_TURNS = Limits.turns
# How often a stream of a job's states looks at the queue, and how long the stream may last.
_QUEUE_SECONDS = 2.0
_STREAM_SECONDS = 600.0


class SceneTurn(Fields):
    text: Text
    speaker_id: Speaker = 0


class ContextTurn(Fields):
    prompt: Text = Field(description="transcript of the recording")
    audio_url: str = Field(description="http(s), where the server allows that, or a data: URI")
    speaker_id: Speaker = 0


class Scene(Options):
    scene: Annotated[list[SceneTurn], FailFast()] = Field(min_length=1, max_length=MAX_TURNS)
    context: Annotated[list[ContextTurn], FailFast()] = Field([], max_length=MAX_TURNS)


class QueuedScene(BaseModel):
    """The stored body of a job: `base` is the URL that the request was sent to."""

    base: str
    fields: Scene


class AudioFile(BaseModel):
    url: str
    content_type: str
    file_name: str
    file_size: int


class SceneResponse(BaseModel):
    audio: AudioFile


def router(service: Service) -> APIRouter:
    """The routes of fal's API, with its queue and downloads."""
    routes = APIRouter(tags=["fal"])

    @routes.post(f"/{APP}", openapi_extra=describe(Scene))
    async def run(http: HTTPRequest, response: Response) -> SceneResponse:
        fields = await read_fields(http, Scene, recordings=True)
        add_notices(response, ignored(_unknown(fields)))
        response.headers[_REQUEST_ID] = request_id()
        return await cancel_on_disconnect(
            http, _speak(service, caller_of(http), fields, str(http.base_url))
        )

    @routes.get("/files/{name}", response_class=Response)
    async def download(name: str) -> Response:
        file = await service.store.downloads.find(name)
        if file is None:
            raise ApiError(404, "there is no such file any more", code="not_found")
        pieces = service.store.downloads.read(file)
        headers = {"Content-Length": str(file.num_bytes)}
        return StreamingResponse(pieces, headers=headers, media_type=file.media_type)

    _add_queue(routes, service)
    return routes


def _add_queue(routes: APIRouter, service: Service) -> None:
    """Adds the routes that submit, follow, fetch and cancel scenes as jobs."""
    queue = f"/queue/{APP}"

    async def run_job(job: Job, body: str) -> dict[str, Any]:
        queued = await service.threads.work(job.caller, QueuedScene.model_validate_json, body)
        response = await _speak(service, job.caller, queued.fields, queued.base, job.log, wait=True)
        return response.model_dump()

    service.jobs.register(_KIND, JobHandler(run_job, lambda job, _: _webhook_body(job)))

    @routes.post(queue, openapi_extra=describe(Scene))
    async def submit(
        http: HTTPRequest, response: Response, fal_webhook: Annotated[str | None, Query()] = None
    ) -> dict[str, Any]:
        fields, caller = await read_fields(http, Scene, recordings=True), caller_of(http)
        add_notices(response, ignored(_unknown(fields)))
        if fal_webhook:
            service.webhooks.check(fal_webhook, caller)
        queued = QueuedScene(base=str(http.base_url), fields=fields)
        body = await service.threads.work(caller, queued.model_dump_json)
        job = await service.jobs.submit(caller, _KIND, body, fal_webhook)
        return _state(service, job, _job_url(http, job))

    @routes.get(queue + "/requests/{job_id}/status")
    async def status(http: HTTPRequest, job_id: str, logs: bool = False) -> JSONResponse:
        job = await service.jobs.find(job_id, caller_of(http).owner)
        code = 200 if job.status is Status.COMPLETED else 202
        return JSONResponse(_state(service, job, _job_url(http, job), logs), code)

    @routes.get(queue + "/requests/{job_id}/status/stream", response_class=Response)
    async def follow(http: HTTPRequest, job_id: str, logs: bool = False) -> StreamingResponse:
        job = await service.jobs.find(job_id, caller_of(http).owner)
        states = _job_states(
            service.jobs, job, lambda: _state(service, job, _job_url(http, job), logs)
        )
        return JobStatesResponse(service.event_stream_limiter, caller_of(http), states)

    @routes.get(queue + "/requests/{job_id}", response_model=SceneResponse)
    async def result(
        http: HTTPRequest, job_id: str, response: Response
    ) -> SceneResponse | JSONResponse:
        job = await service.jobs.find(job_id, caller_of(http).owner)
        if job.status is not Status.COMPLETED:
            raise ApiError(400, "Request is still in progress", code="in_progress")
        if job.error:
            failed = job.error.response(http.scope["path"])
            failed.headers[_REQUEST_ID] = job.id
            return failed
        response.headers[_REQUEST_ID] = job.id
        return SceneResponse.model_validate(job.result)

    @routes.put(queue + "/requests/{job_id}/cancel", status_code=202)
    async def cancel(http: HTTPRequest, job_id: str) -> JSONResponse:
        job = await service.jobs.find(job_id, caller_of(http).owner)
        if not await service.jobs.cancel(job):
            return JSONResponse({"status": "ALREADY_COMPLETED"}, 400)
        return JSONResponse({"status": "CANCELLATION_REQUESTED"}, 202)


def _unknown(fields: Scene) -> list[str]:
    turns = (*fields.scene, *fields.context)
    return [*fields.unknown, *(name for turn in turns for name in turn.unknown)]


async def _speak(
    service: Service,
    caller: Caller,
    fields: Scene,
    base: str,
    progress: Callable[[str], None] = lambda _: None,
    wait: bool = False,
) -> SceneResponse:
    """Generates a scene, and stores it as a file that can be fetched below the URL `base`.

    Args:
      progress: called with a message after each step.
      wait: waits for a permit, as jobs do.
    """
    with await service.admit(caller, wait):
        uploaded = [
            UploadedTurn(turn.speaker_id, turn.prompt, turn.audio_url) for turn in fields.context
        ]
        fetch = functools.partial(fetch_recording, service, caller, "audio_url")
        context = await read_context(service, caller, uploaded, "audio_url", fetch)
        for notice in context.notices:
            progress(notice.message)
        lines = [SceneLine(turn.text, turn.speaker_id) for turn in fields.scene]
        audio = await speak_scene(service, caller, lines, context.turns, fields, progress)
        data = await service.threads.work(caller, encode, audio, service.model.sample_rate, "wav")
    media_type = FORMATS["wav"].media_type
    file = await service.store.downloads.add(caller.owner, data, media_type, "wav")
    return SceneResponse(
        audio=AudioFile(
            url=f"{base}files/{file.name}",
            content_type=file.media_type,
            file_name=file.name,
            file_size=len(data),
        )
    )


def _job_url(http: HTTPRequest, job: Job) -> str:
    return f"{http.base_url}queue/{APP}/requests/{job.id}"


def _state(service: Service, job: Job, url: str, logs: bool = False) -> dict[str, Any]:
    """The state of a job in the form that fal's clients expect."""
    state = {
        "status": job.status.value,
        "request_id": job.id,
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
        "logs": job.logs if logs else None,
    }
    if job.status is Status.QUEUED:
        state["queue_position"] = service.jobs.position(job)
    if job.status is Status.COMPLETED:
        state["metrics"] = {"inference_time": round(job.seconds, 3)}
        if job.error:
            state |= {"error": str(job.error), "error_type": job.error.code}
    return state


class JobStatesResponse(StreamingResponse):
    """A stream of events, counted while it is open. Raises `ApiError` beyond the limit."""

    def __init__(self, limiter: StreamLimiter, caller: Caller, content: AsyncIterator[str]):
        super().__init__(content, media_type="text/event-stream")
        self._limiter = limiter
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._limiter.opened(self._caller):
            await super().__call__(scope, receive, send)


async def _job_states(
    jobs: JobRunner,
    job: Job,
    state_of: Callable[[], dict[str, Any]],
    seconds: float = _STREAM_SECONDS,
) -> AsyncIterator[str]:
    """The states of a job as events, until it cannot change any more or the time is up."""
    loop = asyncio.get_running_loop()
    deadline, last = loop.time() + seconds, None
    while True:
        state = state_of()
        if state != last:
            last = state
            yield f"data: {json.dumps(state)}\n\n"
        if job.status is Status.COMPLETED or not jobs.is_active(job) or loop.time() >= deadline:
            return
        # The state may have changed while the client was reading the last event.
        if state == state_of():
            await job.wait_for_change(min(_QUEUE_SECONDS, max(0.0, deadline - loop.time())))


def _webhook_body(job: Job) -> dict[str, Any]:
    """The body that is posted to a job's webhook."""
    if job.error:
        outcome = {"status": "ERROR", "error": str(job.error), "payload": None}
    else:
        outcome = {"status": "OK", "payload": job.result}
    return {"request_id": job.id, "gateway_request_id": job.id, **outcome}
