"""From a request of any API to its answer: as a whole, or while it is spoken."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fastapi import Request as HTTPRequest
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from csm_jax.request import Notice, Request
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.admission.concurrency import Place
from csm_jax.serve.audio.encoding import FORMATS, Encoder, encode
from csm_jax.serve.errors import ClientGoneError
from csm_jax.serve.middleware.request_log import note
from csm_jax.serve.service import Service
from csm_jax.serve.speech_stream import Live

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


class SpokenFile(NamedTuple):
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
    notices: Sequence[Notice] = (),
) -> SpokenFile:
    """All the speech of a request, in a format of `FORMATS`."""
    live = await service.speak(
        request, caller, stream=False, background=background, notices=notices
    )
    try:
        audio = await live.audio()
    finally:
        live.cancel()
    rate = service.model.sample_rate
    started = time.perf_counter()
    data = await service.work(caller, encode, audio, rate, form, speed)
    note(encode_s=round(time.perf_counter() - started, 4), notices=live.notice_kinds)
    return SpokenFile(data, live)


async def speak_streamed(
    service: Service,
    place: Place,
    request: Request,
    form: str,
    speed: float = 1.0,
    wrap: Wrap | None = None,
    media_type: str | None = None,
    notices: Sequence[Notice] = (),
) -> "SpokenResponse":
    """A response that is sent while it is spoken. What fails before the first chunk is raised.

    Args:
      place: which the response keeps until it ends.
      wrap: makes of the pieces of the file what is sent, as `media_type`.
    """
    encoder = Encoder(form, service.model.sample_rate, speed)
    live = await service.speak(request, place.caller, stream=True, notices=notices)
    try:
        chunks = live.chunks()
        first = await anext(chunks, np.zeros(0, np.float32))
    except BaseException:
        live.cancel()
        raise
    pieces = _encoded(encoder, first, chunks)
    if wrap:
        pieces = wrap(live, pieces)
    place.keep()
    return SpokenResponse(live, place, pieces, media_type=media_type or FORMATS[form].media_type)


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


class PlacedResponse(Response):
    """Gives back the place of its request when it has been sent, or cannot be."""

    def __init__(self, place: Place, content: bytes, **more: Any):
        """Keeps the place. Args: content, more: as for `Response`."""
        super().__init__(content, **more)
        self._place = place
        place.keep()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._place.release()


class SpokenResponse(StreamingResponse):
    """Ends the speech and gives back its place when the response ends, however it does."""

    def __init__(self, live: Live, place: Place, content: AsyncIterator[bytes], **more: Any):
        super().__init__(content, **more)
        self._live = live
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._live.sending():
                await super().__call__(scope, receive, send)
        except ClientGoneError:
            pass  # the server closes the connection of a response that is not complete
        finally:
            self._live.cancel()
            self._place.release()
            note(notices=self._live.notice_kinds)
