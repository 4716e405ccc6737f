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
import io
import json
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from fastapi import APIRouter, Query, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from csm_jax.errors import InputError, first_line
from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.api.openai import Speech, as_request
from csm_jax.serve.api.parsing import describe, parse_json_here, read_fields
from csm_jax.serve.api.responses import speak_whole, unless_gone
from csm_jax.serve.audio.encoding import FORMATS
from csm_jax.serve.errors import ApiError, as_api_error, as_bad_field
from csm_jax.serve.service import Service
from csm_jax.serve.settings import Limits
from csm_jax.serve.store.batches import Batches, BatchRow, FileRow, Line, NewLine, Page
from csm_jax.serve.store.database import FIRST_PAUSE, LAST_PAUSE
from csm_jax.serve.store.errors import StorageError

T = TypeVar("T")

ENDPOINT = "/v1/audio/speech"
MAX_LINES = 50_000
_MEDIA_TYPE = "application/jsonl"
# Attempts at a line that fails through no fault of its own.
_ATTEMPTS = 3
_IDLE_SECONDS = 5.0

After = Annotated[str | None, Query(max_length=64, description="id of the last one of a page")]
PageSize = Annotated[int, Query(ge=1, le=100)]
_Text = Annotated[str, Field(max_length=512)]


class BatchLine(BaseModel):
    """A line of the file."""

    custom_id: str = Field(max_length=256)
    method: Literal["POST"] = "POST"
    url: Literal[ENDPOINT] = ENDPOINT
    body: Speech


_LINE = TypeAdapter(BatchLine)


class NewFile(BaseModel):
    file: bytes = Field(json_schema_extra={"format": "binary"})
    purpose: Literal["batch"] = "batch"


class NewBatch(BaseModel):
    input_file_id: str | None = Field(None, max_length=64)
    file: bytes | None = Field(None, json_schema_extra={"format": "binary"})
    endpoint: Literal[ENDPOINT] = ENDPOINT
    completion_window: str = Field("24h", max_length=16)
    metadata: dict[_Text, _Text] | None = Field(None, max_length=16)


def router(service: Service, worker: "Worker") -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Batches"])
    _add_file_routes(routes, service.store.batches, worker)
    _add_batch_routes(routes, service, worker)
    return routes


def _add_file_routes(routes: APIRouter, store: Batches, worker: "Worker") -> None:
    @routes.post("/files", openapi_extra=describe(NewFile, forms=True))
    async def upload(http: HTTPRequest) -> dict[str, Any]:
        fields = await read_fields(http, NewFile, recordings=True, forms=True)
        return _file(await store.add_file(caller_of(http).owner, "input.jsonl", fields.file))

    @routes.get("/files")
    async def files(http: HTTPRequest, after: After = None, limit: PageSize = 20) -> dict[str, Any]:
        found = await store.list_files(caller_of(http).owner, after, limit)
        return _page(_found(found, "file", after), _file)

    @routes.get("/files/{file_id}")
    async def file(http: HTTPRequest, file_id: str) -> dict[str, Any]:
        found = await store.find_file(file_id, caller_of(http).owner)
        return _file(_found(found, "file", file_id))

    @routes.get("/files/{file_id}/content", response_class=Response)
    async def content(http: HTTPRequest, file_id: str) -> Response:
        owner = caller_of(http).owner
        found = _found(await store.find_file(file_id, owner), "file", file_id)
        if found.batch is not None:
            return StreamingResponse(_lines(store, found.batch), media_type=_MEDIA_TYPE)
        # One that is deleted meanwhile ends before its length.
        headers = {"Content-Length": str(found.num_bytes)}
        return StreamingResponse(store.read_upload(found), headers=headers, media_type=_MEDIA_TYPE)

    @routes.delete("/files/{file_id}")
    async def delete(http: HTTPRequest, file_id: str) -> dict[str, Any]:
        deleted = await store.delete_file(file_id, caller_of(http).owner)
        if (batch := _found(deleted, "file", file_id).batch) is not None:
            worker.drop(batch)
        return {"id": file_id, "object": "file", "deleted": True}


def _add_batch_routes(routes: APIRouter, service: Service, worker: "Worker") -> None:
    store = service.store.batches

    @routes.post("/batches", openapi_extra=describe(NewBatch, forms=True))
    async def create(http: HTTPRequest) -> dict[str, Any]:
        fields = await read_fields(http, NewBatch, recordings=True, forms=True)
        if (fields.file is None) == (fields.input_file_id is None):
            raise ApiError(400, "give either input_file_id or file", param="input_file_id")
        batch = await unless_gone(http, _begin(service, caller_of(http), fields))
        worker.wake()
        return _batch(batch)

    @routes.get("/batches")
    async def batches(
        http: HTTPRequest, after: After = None, limit: PageSize = 20
    ) -> dict[str, Any]:
        found = await store.list(caller_of(http).owner, after, limit)
        return _page(_found(found, "batch", after), _batch)

    @routes.get("/batches/{batch_id}")
    async def batch(http: HTTPRequest, batch_id: str) -> dict[str, Any]:
        found = await store.find(batch_id, caller_of(http).owner)
        return _batch(_found(found, "batch", batch_id))

    @routes.post("/batches/{batch_id}/cancel")
    async def cancel(http: HTTPRequest, batch_id: str) -> dict[str, Any]:
        found = _found(await store.cancel(batch_id, caller_of(http).owner), "batch", batch_id)
        worker.drop(batch_id)
        return _batch(found)


async def _begin(service: Service, caller: Caller, fields: NewBatch) -> BatchRow:
    """Begins a batch when it is its caller's turn to have a file read and checked."""

    def begin() -> BatchRow:
        store, name, data = service.store.batches, fields.input_file_id, fields.file
        if data is None:
            data = _found(store.read_file(name, caller.owner), "file", name)
        lines = _check(data, service.settings.limits)
        return store.add_batch(caller, lines, fields.metadata, name, data)

    with await service.admit(caller):
        return await service.work(caller, begin)


class _Result(NamedTuple):
    """The result of a line, as a line of the results file."""

    text: str
    is_good: bool


class Worker:
    """Speaks the lines of all batches, as many at once as the engine admits in the background."""

    def __init__(self, service: Service):
        self._service = service
        self._store = service.store.batches
        self._database = service.store.database
        self._at_once = max(1, min(service.settings.max_batch - 1, service.settings.max_queue))
        self._running: dict[Line, asyncio.Task] = {}
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Says that there is something to do."""
        self._woken.set()

    def drop(self, batch_id: str) -> None:
        """Stops what is being spoken of a batch."""
        for line, task in self._running.items():
            if line.batch == batch_id:
                task.cancel()

    async def run(self) -> None:
        """Until it is cancelled; what is being spoken then is spoken again after a restart."""
        pause = FIRST_PAUSE
        try:
            while True:
                self._woken.clear()
                try:
                    await self._begin_lines()
                    self._database.problems.pop("batches", None)
                    pause = FIRST_PAUSE
                except Exception as error:
                    self._report(error)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LAST_PAUSE)
                    continue
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), _IDLE_SECONDS)
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _report(self, error: BaseException) -> None:
        if not isinstance(error, StorageError):  # of which the database tells
            message = f"batches are not spoken: {first_line(error)}"
            self._database.report("batches", message, error)

    async def _begin_lines(self) -> None:
        while self._has_room and (line := await self._store.next_line(list(self._running))):
            task = self._running[line] = asyncio.create_task(self._speak(line))
            task.add_done_callback(lambda task, line=line: self._done(line, task))

    @property
    def _has_room(self) -> bool:
        # On a full disk one line at a time is begun: its result is kept until there is room, and
        # is what finds out.
        most = 1 if self._database.is_full else self._at_once
        return len(self._running) < most

    def _done(self, line: Line, task: asyncio.Task) -> None:
        del self._running[line]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report(error)
        else:
            self._woken.set()

    async def _speak(self, line: Line) -> None:
        """Speaks a line, and stores its result."""
        if (spoken := await self._outcome(line)) is not None:
            await self._store.write_result(line, *spoken)

    async def _outcome(self, line: Line) -> _Result | None:
        """The result of a line; None if it is spoken again later, if need be after a restart."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._answer(line)
            except Exception as failure:
                error = as_api_error(failure)
                if isinstance(failure, InputError) or error.status == 400:
                    break
                await asyncio.sleep(attempt)
        if error.status == 429 or self._service.is_closing or not self._service.engine.is_alive:
            return None
        return _Result(_result(line, None, error.body["error"]), False)

    async def _answer(self, line: Line) -> _Result:
        service = self._service
        fields = await service.work(line.caller, _fields, line)
        request = as_request(service, line.caller, fields)
        form = fields.response_format
        spoken = await speak_whole(
            service, line.caller, request, form, fields.speed, background=True
        )

        def write() -> str:
            body = {"audio": base64.b64encode(spoken.data).decode()}
            body["content_type"] = FORMATS[form].media_type
            return _result(line, {"status_code": 200, "body": body}, None)

        return _Result(await service.work(line.caller, write), True)


def _fields(line: Line) -> Speech:
    try:
        return BatchLine.model_validate_json(line.body).body
    except ValidationError as error:  # the line was stored by another version
        raise as_bad_field(error) from error


def _result(line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> str:
    result = {
        "id": f"{line.batch}-{line.number}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(result)


def _check(data: bytes, limits: Limits) -> list[NewLine]:
    """The lines of a file, if all of them can be spoken; raises `ApiError` for the first that
    cannot."""
    lines: dict[str, NewLine] = {}
    _check_count(data.count(b"\n") // 2)  # blank lines are skipped, but not any number of them
    for text in filter(bytes.strip, io.BytesIO(data)):
        number = len(lines) + 1
        _check_count(number)
        try:
            line = _check_line(text, limits)
        except ApiError as error:
            message = f"line {number}: {error}"
            raise ApiError(400, message, param="file", code=error.code) from error
        name = line.custom_id
        if name in lines:
            raise ApiError(400, f"line {number}: custom_id {name!r} is there twice", param="file")
        lines[name] = line
    if not lines:
        raise ApiError(400, f"the file has 0 lines, but must have 1 to {MAX_LINES}", param="file")
    return list(lines.values())


def _check_count(count: int) -> None:
    if count > MAX_LINES:
        message = f"the file has too many lines: at most {MAX_LINES} make a batch"
        raise ApiError(400, message, param="file", code="too_long")


def _check_line(text: bytes, limits: Limits) -> NewLine:
    """A line as it is stored: nothing but what will be spoken. Raises `ApiError`."""
    if len(text) > limits.json_bytes:
        message = f"it has {len(text)} bytes, but at most {limits.json_bytes} are read"
        raise ApiError(400, message, code="too_long")
    line = parse_json_here(_LINE, text, limits)
    return NewLine(line.custom_id, line.model_dump_json(exclude_unset=True))


def _found(row: T | None, kind: str, name: str | None) -> T:
    """The row. Raises `ApiError` if there is none, or it is another owner's."""
    if row is None:
        raise ApiError(404, f"there is no {kind} {(name or '')[:80]!r}", code="not_found")
    return row


async def _lines(store: Batches, batch_id: str) -> AsyncIterator[str]:
    async for result in store.results(batch_id):
        yield result + "\n"


def _page(page: Page, as_entry: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    entries = [as_entry(row) for row in page.rows]
    names = [entry["id"] for entry in entries] or [None]
    return {
        "object": "list",
        "data": entries,
        "first_id": names[0],
        "last_id": names[-1],
        "has_more": page.has_more,
    }


def _file(found: FileRow) -> dict[str, Any]:
    return {
        "id": found.id,
        "object": "file",
        "bytes": found.num_bytes,
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
        "metadata": None if row.metadata is None else json.loads(row.metadata),
    }
