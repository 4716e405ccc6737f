"""Batches as OpenAI's clients send them: many lines of speech, behind all live requests.

    curl localhost:8000/v1/files -F purpose=batch -F file=@lines.jsonl
    curl localhost:8000/v1/batches -d '{"input_file_id": "file-...", ...}' -H ...

A line of the file is {"custom_id": "a", "method": "POST", "url": "/v1/audio/speech", "body":
{...}}; a line of the results {"custom_id": "a", "response": {"status_code": 200, "body": {"audio":
"<base64>", "content_type": "audio/mpeg"}}, "error": null}. `POST /v1/batches` also takes the file
itself, as a form.
"""

import asyncio
import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any, Literal

from fastapi import APIRouter, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, ValidationError

from csm_jax.errors import CSMError, InputError
from csm_jax.serve.answers import speak_whole
from csm_jax.serve.batch_store import BatchRow, BatchStore, FileRow, Line
from csm_jax.serve.caller import INTERNAL
from csm_jax.serve.errors import ApiError, as_api_error, as_bad_field
from csm_jax.serve.fields import both_kinds, read_fields
from csm_jax.serve.formats import FORMATS
from csm_jax.serve.openai import Speech, as_request
from csm_jax.serve.service import Service

ENDPOINT = "/v1/audio/speech"
MAX_LINES = 50_000
# Attempts at a line that fails through no fault of its own.
_ATTEMPTS = 3
_IDLE_SECONDS = 5.0
# What all files and results may take; then somebody has to delete some.
MAX_STORED_BYTES = 4_000_000_000


class BatchLine(BaseModel):
    """A line of the file."""

    custom_id: str = Field(max_length=256)
    method: Literal["POST"] = "POST"
    url: Literal[ENDPOINT] = ENDPOINT
    body: Speech


class NewFile(BaseModel):
    file: bytes = Field(json_schema_extra={"format": "binary"})
    purpose: Literal["batch"] = "batch"


class NewBatch(BaseModel):
    input_file_id: str | None = Field(None, max_length=64)
    file: bytes | None = Field(None, json_schema_extra={"format": "binary"})
    endpoint: Literal[ENDPOINT] = ENDPOINT
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


def router(service: Service, worker: "Worker") -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Batches"])
    store = worker.store

    @routes.post("/files", openapi_extra=both_kinds(NewFile))
    async def upload(http: HTTPRequest) -> dict[str, Any]:
        fields = await read_fields(http, NewFile)
        return _file(store, await service.in_thread(_keep, store, fields.file))

    @routes.get("/files/{file_id}")
    def file(file_id: str) -> dict[str, Any]:
        return _file(store, file_id)

    @routes.get("/files/{file_id}/content", response_class=Response)
    def content(file_id: str) -> Response:
        found = _find_file(store, file_id)
        if found.batch is None:
            return Response(found.data, media_type="application/jsonl")
        return StreamingResponse(_lines(store, found.batch), media_type="application/jsonl")

    @routes.delete("/files/{file_id}")
    def delete(file_id: str) -> dict[str, Any]:
        _find_file(store, file_id)
        store.delete_file(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @routes.post("/batches", openapi_extra=both_kinds(NewBatch))
    async def create(http: HTTPRequest) -> dict[str, Any]:
        fields = await read_fields(http, NewBatch)
        if (fields.file is None) == (fields.input_file_id is None):
            raise ApiError(400, "give either input_file_id or file", param="input_file_id")
        data = fields.file
        if data is None:
            data = _find_file(store, fields.input_file_id).data or b""
        bodies = await service.in_thread(_check, data)
        file_id = fields.input_file_id or await service.in_thread(_keep, store, data)
        _check_room(store, len(data))
        batch_id = await service.in_thread(store.add_batch, file_id, bodies)
        worker.wake()
        return _batch(_find(store, batch_id))

    @routes.get("/batches")
    def listed() -> dict[str, Any]:
        found = [_batch(row) for row in store.batches()[:100]]
        return {"object": "list", "data": found, "has_more": False}

    @routes.get("/batches/{batch_id}")
    def batch(batch_id: str) -> dict[str, Any]:
        return _batch(_find(store, batch_id))

    @routes.post("/batches/{batch_id}/cancel")
    def cancel(batch_id: str) -> dict[str, Any]:
        _find(store, batch_id)
        store.cancel(batch_id)
        worker.drop(batch_id)
        return _batch(_find(store, batch_id))

    return routes


class Worker:
    """Speaks the lines of all batches, as many at once as the engine lets in the background."""

    def __init__(self, service: Service, store: BatchStore):
        self.store = store
        self._service = service
        self._at_once = max(1, min(service.settings.max_batch - 1, service.settings.max_queue))
        self._running: dict[tuple[str, int], asyncio.Task] = {}
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There is something to do."""
        self._loop.call_soon_threadsafe(self._woken.set)

    def drop(self, batch_id: str) -> None:
        """Stops what is being spoken of a batch."""
        for (batch, _), task in list(self._running.items()):
            if batch == batch_id:
                self._loop.call_soon_threadsafe(task.cancel)

    async def run(self) -> None:
        """Until it is cancelled; what is being spoken then is spoken again after a restart."""
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                self._woken.clear()
                is_full = self.store.num_bytes > MAX_STORED_BYTES
                room = 0 if is_full else self._at_once - len(self._running)
                for line in self.store.pending(list(self._running), room):
                    task = asyncio.create_task(self._speak(line))
                    self._running[line.batch, line.number] = task
                    task.add_done_callback(lambda _, key=line[:2]: self._done(key))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), _IDLE_SECONDS)
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.store.close()

    def _done(self, key: tuple[str, int]) -> None:
        del self._running[key]
        self._woken.set()

    async def _speak(self, line: Line) -> None:
        """Speaks a line, and writes what came of it."""
        asked = BatchLine.model_validate_json(line.body)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                answer, error = await self._answer(asked.body), None
                break
            except (CSMError, ApiError) as failure:
                answer, error = None, as_api_error(failure)
                if isinstance(failure, InputError) or error.status == 400:
                    break
                await asyncio.sleep(attempt)
        is_busy = error and error.status == 429
        if is_busy or (error and not self._service.engine.is_alive):
            return  # its turn comes again, if need be after a restart
        result = {"id": f"{line.batch}-{line.number}", "custom_id": asked.custom_id}
        result |= {"response": answer, "error": error and error.body["error"]}
        await self._service.in_thread(
            self.store.write_result, line, json.dumps(result), error is None
        )

    async def _answer(self, fields: Speech) -> dict[str, Any]:
        request = as_request(self._service, INTERNAL, fields)
        form = fields.response_format
        spoken = await speak_whole(
            self._service, INTERNAL, request, form, fields.speed, background=True
        )
        body = {"audio": base64.b64encode(spoken.data).decode()}
        body["content_type"] = FORMATS[form].media_type
        return {"status_code": 200, "body": body}


def _check(data: bytes) -> list[str]:
    """The lines of a file, if all of them can be spoken; raises `ApiError` for the first that
    cannot."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    if not 0 < len(lines) <= MAX_LINES:
        raise ApiError(400, f"the file has {len(lines)} lines, but must have 1 to {MAX_LINES}")
    names = set()
    for number, line in enumerate(lines, 1):
        try:
            name = BatchLine.model_validate_json(line).custom_id
        except ValidationError as error:
            message = f"line {number}: {as_bad_field(error)}"
            raise ApiError(400, message, param="file") from error
        if name in names:
            raise ApiError(400, f"line {number}: custom_id {name!r} is there twice", param="file")
        names.add(name)
    return [line.decode() for line in lines]


def _check_room(store: BatchStore, num_bytes: int) -> None:
    """Raises `ApiError` if there is none for so much more."""
    if store.num_bytes + num_bytes > MAX_STORED_BYTES:
        message = f"files and results take {MAX_STORED_BYTES} bytes already: delete some"
        raise ApiError(429, message, code="storage_full", retry_after=60)


def _keep(store: BatchStore, data: bytes) -> str:
    _check_room(store, len(data))
    return store.add_file("input.jsonl", data)


def _find_file(store: BatchStore, file_id: str) -> FileRow:
    if (found := store.find_file(file_id)) is None:
        raise ApiError(404, f"there is no file {file_id[:80]!r}", code="not_found")
    return found


def _find(store: BatchStore, batch_id: str) -> BatchRow:
    if not (found := store.batches(batch_id)):
        raise ApiError(404, f"there is no batch {batch_id[:80]!r}", code="not_found")
    return found[0]


def _lines(store: BatchStore, batch_id: str) -> Iterator[str]:
    for result in store.results(batch_id):
        yield result + "\n"


def _file(store: BatchStore, file_id: str) -> dict[str, Any]:
    found = _find_file(store, file_id)
    return {
        "id": found.id,
        "object": "file",
        "bytes": len(found.data or b""),
        "created_at": found.created,
        "filename": found.name,
        "purpose": found.purpose,
        "status": "processed",
    }


def _batch(row: BatchRow) -> dict[str, Any]:
    ended = "cancelled" if row.is_cancelled else "completed"
    counts = {"total": row.total, "completed": row.completed, "failed": row.failed}
    return {
        "id": row.id,
        "object": "batch",
        "endpoint": ENDPOINT,
        "input_file_id": row.input_file,
        "output_file_id": row.output_file,
        "completion_window": "24h",
        "status": ended if row.ended else "in_progress",
        "created_at": row.created,
        f"{ended}_at": row.ended,
        "request_counts": counts,
    }
