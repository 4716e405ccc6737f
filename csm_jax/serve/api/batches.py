"""OpenAI's API of files and batches: many requests for speech in one file.

    curl localhost:8000/v1/files -F purpose=batch -F file=@lines.jsonl
    curl localhost:8000/v1/batches -d '{"input_file_id": "file-...", ...}' -H ...

A line of the file is {"custom_id": "a", "method": "POST", "url": "/v1/audio/speech", "body":
{...}}; a line of the results {"custom_id": "a", "response": {"status_code": 200, "body": {"audio":
"<base64>", "content_type": "audio/mpeg"}}, "error": null}. `POST /v1/batches` also accepts the file
itself, as a form. `batch_worker.py` runs the lines.
"""

import codecs
import io
import json
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal, TypeVar, get_args

from fastapi import APIRouter, Query, Response
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from pydantic import Field, TypeAdapter

from csm_jax.serve.admission.caller import Caller, caller_of
from csm_jax.serve.api.batch_worker import BatchLine, BatchWorker, Endpoint
from csm_jax.serve.api.fields import Fields, reported
from csm_jax.serve.api.parsing import describe, parse_json_sync, read_fields
from csm_jax.serve.api.responses import cancel_on_disconnect
from csm_jax.serve.errors import ApiError
from csm_jax.serve.service import Service
from csm_jax.serve.settings import Limits
from csm_jax.serve.store.batches import Batches, BatchRow, FileRow, NewLine, Page

T = TypeVar("T")

MAX_LINES = 50_000
_MEDIA_TYPE = "application/jsonl"

After = Annotated[
    str | None, Query(max_length=64, description="id of the last one on the page before")
]
PageSize = Annotated[int, Query(ge=1, le=100)]
_Text = Annotated[str, Field(max_length=512)]


_LINE = TypeAdapter(BatchLine)


class NewFile(Fields):
    file: bytes = Field(json_schema_extra={"format": "binary"})
    purpose: Literal["batch"] = "batch"


class NewBatch(Fields):
    input_file_id: str | None = Field(None, max_length=64)
    file: bytes | None = Field(None, json_schema_extra={"format": "binary"})
    endpoint: Endpoint = "/v1/audio/speech"
    completion_window: str = Field("24h", max_length=16)
    metadata: dict[_Text, _Text] | None = Field(None, max_length=16)


def router(service: Service, worker: BatchWorker) -> APIRouter:
    """The routes of files and batches, whose lines `worker` runs."""
    routes = APIRouter(prefix="/v1", tags=["Batches"])
    _add_file_routes(routes, service.store.batches, worker)
    _add_batch_routes(routes, service, worker)
    return routes


def _add_file_routes(routes: APIRouter, store: Batches, worker: BatchWorker) -> None:
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


def _add_batch_routes(routes: APIRouter, service: Service, worker: BatchWorker) -> None:
    store = service.store.batches

    @routes.post("/batches", openapi_extra=describe(NewBatch, forms=True))
    async def create(http: HTTPRequest) -> dict[str, Any]:
        fields = await read_fields(http, NewBatch, recordings=True, forms=True)
        if (fields.file is None) == (fields.input_file_id is None):
            raise ApiError(400, "give either input_file_id or file", param="input_file_id")
        batch = await cancel_on_disconnect(http, _create_batch(service, caller_of(http), fields))
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


async def _create_batch(service: Service, caller: Caller, fields: NewBatch) -> BatchRow:
    """Reads and checks the file of a batch when it is the caller's turn, and stores the batch."""

    def create() -> BatchRow:
        store, name, data = service.store.batches, fields.input_file_id, fields.file
        if data is None:
            data = _found(store.read_file(name or "", caller.owner), "file", name)
        lines = _parse_lines(data, service.settings.limits)
        return store.add_batch(caller, lines, fields.metadata, name, data)

    with await service.admit(caller):
        return await service.threads.work(caller, create)


def _parse_lines(data: bytes, limits: Limits) -> list[NewLine]:
    """Parses the lines of a file. Raises `ApiError` for the first invalid one."""
    lines: dict[str, NewLine] = {}
    data = data.removeprefix(codecs.BOM_UTF8)
    _check_count(data.count(b"\n") // 2)  # blank lines are skipped, up to a number
    for text in filter(bytes.strip, io.BytesIO(data)):
        number = len(lines) + 1
        _check_count(number)
        try:
            line = _parse_line(text, limits)
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


def _parse_line(text: bytes, limits: Limits) -> NewLine:
    """Parses a line, and drops the values of unknown fields. Raises `ApiError`."""
    if len(text) > limits.json_bytes:
        message = f"it has {len(text)} bytes, but at most {limits.json_bytes} are read"
        raise ApiError(400, message, code="too_long")
    line = parse_json_sync(_LINE, text, limits)
    stored = line.model_dump(mode="json", exclude_unset=True)
    # Their names are for the notices of the result.
    stored["body"] |= dict.fromkeys(reported(line.body.unknown), True)
    return NewLine(line.custom_id, json.dumps(stored))


def _found(row: T | None, kind: str, name: str | None) -> T:
    """The row. Raises `ApiError` if it was not found, or belongs to another owner."""
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
        "endpoint": get_args(Endpoint)[0],
        "input_file_id": row.input_file,
        "output_file_id": row.output_file,
        "completion_window": "24h",
        "status": ended if row.ended else "in_progress",
        "created_at": row.created,
        f"{ended}_at": row.ended,
        "request_counts": counts,
        "metadata": None if row.metadata is None else json.loads(row.metadata),
    }
