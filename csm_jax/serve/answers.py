"""From a request of any API to its answer: as a whole, or while it is spoken."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fastapi import Request as HTTPRequest
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from csm_jax.serve.caller import Caller, caller_of
from csm_jax.serve.errors import ClientGoneError
from csm_jax.serve.formats import FORMATS, Encoder, encode
from csm_jax.serve.middleware.log import note
from csm_jax.serve.service import Live, Service
from csm_jax.speech import Request

T = TypeVar("T")
Wrap = Callable[[Live, AsyncIterator[bytes]], AsyncIterator[bytes]]


async def unless_gone(http: HTTPRequest, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to. It is given up if the client leaves.

    The body has been read before.

    Raises:
      ClientGoneError: it left.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(http))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class Whole(NamedTuple):
    """Speech that is over, as a file."""

    data: bytes
    live: Live


async def speak_whole(
    service: Service,
    caller: Caller,
    request: Request,
    form: str,
    speed: float = 1.0,
    background: bool = False,
) -> Whole:
    """All the speech of a request, in a format of `FORMATS`."""
    live = await service.speak(request, caller, stream=False, background=background)
    try:
        audio = await live.audio()
    finally:
        live.cancel()
    rate = service.model.sample_rate
    started = time.perf_counter()
    data = await service.in_thread(encode, audio, rate, form, speed)
    note(encode_s=round(time.perf_counter() - started, 4), notices=live.notice_kinds)
    return Whole(data, live)


async def speak_streamed(
    service: Service,
    http: HTTPRequest,
    request: Request,
    form: str,
    speed: float = 1.0,
    wrap: Wrap | None = None,
    media_type: str | None = None,
) -> "SpokenResponse":
    """An answer that is sent while it is spoken. What fails before the first chunk is raised.

    Args:
      wrap: makes of the pieces of the file what is sent, as `media_type`.
    """
    encoder = Encoder(form, service.model.sample_rate, speed)

    async def start() -> tuple[Live, AsyncIterator[np.ndarray], np.ndarray]:
        live = await service.speak(request, caller_of(http), stream=True)
        try:
            chunks = live.chunks()
            return live, chunks, await anext(chunks, np.zeros(0, np.float32))
        except BaseException:
            live.cancel()
            raise

    live, chunks, first = await unless_gone(http, start())
    pieces = _encoded(encoder, first, chunks)
    if wrap:
        pieces = wrap(live, pieces)
    return SpokenResponse(live, pieces, media_type=media_type or FORMATS[form].media_type)


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


class SpokenResponse(StreamingResponse):
    """Ends the speech when the answer ends, however it does."""

    def __init__(self, live: Live, content: AsyncIterator[bytes], **more: Any):
        super().__init__(content, **more)
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._live.cancel()
            note(notices=self._live.notice_kinds)
