"""Responses of all APIs: speech as a whole, or streamed during generation."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fastapi import Request as HTTPRequest
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from csm_jax.inference.alignment.words import Word
from csm_jax.inference.request import Notice, Request
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.admission.concurrency import Permit
from csm_jax.serve.api.words import at_speed
from csm_jax.serve.audio.encoding import Encoder, encode, find_format
from csm_jax.serve.errors import ClientGoneError
from csm_jax.serve.middleware.request_log import add_log_fields
from csm_jax.serve.service import Service
from csm_jax.serve.speech_stream import SpeechStream

# The header with the kinds of all notices that are known when the response begins.
NOTICES = "X-Notices"
T = TypeVar("T")
Wrap = Callable[[SpeechStream, AsyncIterator[bytes]], AsyncIterator[bytes]]


async def cancel_on_disconnect(http: HTTPRequest, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and cancels it if the client disconnects.

    The body of the request must have been read before.

    Raises:
      ClientGoneError: the client has disconnected.
    """
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(http))
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, disconnected):
            each.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)


async def _wait_for_disconnect(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class SpokenFile(NamedTuple):
    """Finished speech as a file, and its words if they were asked for."""

    data: bytes
    speech: SpeechStream
    words: Sequence[Word] = ()


async def speak_whole(
    service: Service,
    caller: Caller,
    request: Request,
    audio_format: str,
    speed: float = 1.0,
    background: bool = False,
    notices: Sequence[Notice] = (),
    has_words: bool = False,
) -> SpokenFile:
    """Generates the speech of a request as one file, in a format of `find_format`.

    Args:
      has_words: whether its words are wanted too.
    """
    speech = await service.speak(
        request, caller, stream=False, background=background, notices=notices
    )
    try:
        audio = await speech.audio()
    finally:
        speech.cancel()
    words = at_speed(await speech.words(audio), speed) if has_words else ()
    rate = service.model.sample_rate
    started = time.perf_counter()
    data = await service.threads.work(caller, encode, audio, rate, audio_format, speed)
    add_log_fields(encode_s=round(time.perf_counter() - started, 4), notices=speech.notice_kinds)
    return SpokenFile(data, speech, words)


async def speak_streamed(
    service: Service,
    permit: Permit,
    request: Request,
    audio_format: str,
    speed: float = 1.0,
    wrap: Wrap | None = None,
    media_type: str | None = None,
    notices: Sequence[Notice] = (),
) -> "SpokenResponse":
    """A response that is sent during generation. Errors before the first chunk are raised.

    Args:
      permit: of the request; the response releases it.
      wrap: turns the pieces of the file into those of another `media_type`.
    """
    encoder = Encoder(audio_format, service.model.sample_rate, speed)
    speech = await service.speak(request, permit.caller, stream=True, notices=notices)
    try:
        chunks = speech.chunks()
        first = await anext(chunks, np.zeros(0, np.float32))
    except BaseException:
        speech.cancel()
        raise
    pieces = _encoded(encoder, first, chunks)
    if wrap:
        pieces = wrap(speech, pieces)
    permit.keep()
    media_type = media_type or find_format(audio_format).media_type
    response = SpokenResponse(speech, permit, pieces, media_type=media_type)
    if kinds := speech.notice_kinds:
        response.headers[NOTICES] = kinds
    return response


async def speak_file(
    service: Service,
    permit: Permit,
    request: Request,
    audio_format: str,
    speed: float = 1.0,
    notices: Sequence[Notice] = (),
) -> "PermitResponse":
    """A response that is sent when the speech is finished; its file and its head have a length.

    Args:
      permit: of the request; the response releases it.
    """
    spoken = await speak_whole(
        service, permit.caller, request, audio_format, speed, notices=notices
    )
    headers = {NOTICES: spoken.speech.notice_kinds}
    media_type = find_format(audio_format).media_type
    return PermitResponse(permit, spoken.data, media_type=media_type, headers=headers)


def add_notices(response: Response, notices: Sequence[Notice]) -> None:
    """Adds the header with the kinds of notices, if there are any."""
    if notices:
        response.headers[NOTICES] = ",".join(sorted({notice.kind for notice in notices}))


async def _encoded(
    encoder: Encoder, first: np.ndarray, chunks: AsyncIterator[np.ndarray]
) -> AsyncIterator[bytes]:
    if data := encoder.add(first):
        yield data
    async for chunk in chunks:
        if data := encoder.add(chunk):
            yield data
    if data := encoder.finish():
        yield data


class PermitResponse(Response):
    """A response that releases the permit of its request when it has been sent, or has failed."""

    def __init__(self, permit: Permit, content: bytes | str, **options: Any):
        """Keeps the permit. The other arguments are those of `Response`."""
        super().__init__(content, **options)
        self._permit = permit
        permit.keep()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._permit.release()


class SpokenResponse(StreamingResponse):
    """Streamed speech, which ends its request and releases the permit when the response ends."""

    def __init__(
        self, speech: SpeechStream, permit: Permit, content: AsyncIterator[bytes], **options: Any
    ):
        super().__init__(content, **options)
        self._speech = speech
        self._permit = permit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._speech.sending():
                await super().__call__(scope, receive, send)
        except ClientGoneError:
            pass  # uvicorn closes the connection, because the response is not complete
        finally:
            self._speech.cancel()
            self._permit.release()
            add_log_fields(notices=self._speech.notice_kinds)
