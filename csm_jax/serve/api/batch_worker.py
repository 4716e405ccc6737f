"""Generates the speech of batches, in the background of all other requests."""

import asyncio
import base64
import contextlib
import json
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from csm_jax.errors import InputError, first_line
from csm_jax.serve.api.fields import Fields
from csm_jax.serve.api.openai import Speech, as_request
from csm_jax.serve.api.responses import speak_whole
from csm_jax.serve.audio.encoding import FORMATS
from csm_jax.serve.errors import StorageError, as_api_error, as_bad_field
from csm_jax.serve.service import Service
from csm_jax.serve.store.batches import Line
from csm_jax.serve.store.database import FIRST_PAUSE, LAST_PAUSE

Endpoint = Literal["/v1/audio/speech"]
# Attempts at a line that fails by no fault of its own.
_ATTEMPTS = 3
_IDLE_SECONDS = 5.0


class BatchLine(Fields):
    """A line of a batch's file."""

    custom_id: str = Field(max_length=256)
    method: Literal["POST"] = "POST"
    url: Endpoint = "/v1/audio/speech"
    body: Speech


class _Result(NamedTuple):
    """The result of a line, as a line of the results file."""

    text: str
    is_success: bool


class BatchWorker:
    """Runs the lines of all batches, as many at once as the engine admits in the background."""

    def __init__(self, service: Service):
        self._service = service
        self._store = service.store.batches
        self._database = service.store.database
        self._max_running = max(1, min(service.settings.max_batch - 1, service.settings.max_queue))
        self._running: dict[Line, asyncio.Task] = {}
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Lets the worker look for new lines at once."""
        self._woken.set()

    def drop(self, batch_id: str) -> None:
        """Cancels the running lines of a batch."""
        for line, task in self._running.items():
            if line.batch == batch_id:
                task.cancel()

    async def run(self) -> None:
        """Runs until it is cancelled; running lines are generated again after a restart."""
        pause = FIRST_PAUSE
        try:
            while True:
                self._woken.clear()
                try:
                    await self._start_lines()
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
        if not isinstance(error, StorageError):  # which the database reports itself
            message = f"batches do not run: {first_line(error)}"
            self._database.report("batches", message, error)

    async def _start_lines(self) -> None:
        while self._has_room and (line := await self._store.next_line(list(self._running))):
            task = self._running[line] = asyncio.create_task(self._run_line(line))
            task.add_done_callback(lambda task, line=line: self._finish(line, task))

    @property
    def _has_room(self) -> bool:
        # On a full disk one line runs at a time; writing its result waits until there is room.
        most = 1 if self._database.is_full else self._max_running
        return len(self._running) < most

    def _finish(self, line: Line, task: asyncio.Task) -> None:
        del self._running[line]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report(error)
        else:
            self._woken.set()

    async def _run_line(self, line: Line) -> None:
        """Generates the speech of a line, and stores its result."""
        if (result := await self._outcome(line)) is not None:
            await self._store.write_result(line, *result)

    async def _outcome(self, line: Line) -> _Result | None:
        """The result of a line; None if it has to run again later, or after a restart."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._generate(line)
            except Exception as failure:
                error = as_api_error(failure)
                if isinstance(failure, InputError) or error.status in (400, 404):
                    break
                await asyncio.sleep(attempt)
                if attempt == _ATTEMPTS:
                    break
        if error.status == 429 or self._service.is_closing or not self._service.engine.is_alive:
            return None
        return _Result(_result_json(line, None, error.body["error"]), False)

    async def _generate(self, line: Line) -> _Result:
        service = self._service
        fields = await service.threads.work(line.caller, _fields, line)
        request, notices = await as_request(service, line.caller, fields)
        audio_format = fields.response_format
        spoken = await speak_whole(
            service,
            line.caller,
            request,
            audio_format,
            fields.speed,
            background=True,
            notices=notices,
        )

        def write() -> str:
            body = {"audio": base64.b64encode(spoken.data).decode()}
            body["content_type"] = FORMATS[audio_format].media_type
            if kinds := spoken.speech.notice_kinds:
                body["notices"] = kinds
            return _result_json(line, {"status_code": 200, "body": body}, None)

        return _Result(await service.threads.work(line.caller, write), True)


def _fields(line: Line) -> Speech:
    try:
        return BatchLine.model_validate_json(line.body).body
    except ValidationError as error:  # a line that another version has stored
        raise as_bad_field(error) from error


def _result_json(line: Line, response: dict[str, Any] | None, error: dict[str, Any] | None) -> str:
    result = {
        "id": f"{line.batch}-{line.number}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(result)
