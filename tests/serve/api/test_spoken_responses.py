"""A response and its request end together."""

import asyncio

import numpy as np
import pytest

from csm_jax import Request
from csm_jax.errors import RequestCancelledError
from csm_jax.serve.admission.caller import INTERNAL
from csm_jax.serve.api.responses import SpokenResponse, speak_streamed
from csm_jax.serve.errors import ClientGoneError

LONG = Request("one two three four five six " * 20, seed=1, max_audio_length_ms=60_000)
SCOPE = {"type": "http", "asgi": {"spec_version": "2.4"}, "headers": []}


@pytest.fixture
def in_server(server):
    """Runs a coroutine in the event loop of the server."""

    def run(coroutine):
        loop = server.service.warmed.get_loop()
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    return run


async def begin(service) -> SpokenResponse:
    with await service.admit(INTERNAL) as place:
        return await speak_streamed(service, place, LONG, "pcm")


async def never(*_: object) -> None:
    await asyncio.sleep(3600)


def test_a_reader_that_is_dropped_frees_its_row_and_its_place(server, in_server):
    """Although the response is stuck in sending, and its client has not left."""
    service = server.service

    async def scenario() -> None:
        response = await begin(service)
        assert service.places.num_held == 1
        sending = asyncio.create_task(response(SCOPE, never, never))
        await asyncio.sleep(0.3)
        assert not sending.done()
        live = response._live
        assert live.unread_seconds > 0
        live.drop()
        await asyncio.wait_for(sending, 5)
        assert live.unread_seconds == 0
        assert not live._chunks
        assert service.places.num_held == 0

    in_server(scenario())
    server.wait_until_idle(5)


def test_cancelling_a_response_raises_cancelled_error(server, in_server):
    """As when the server ends: that is no dropped reader."""
    service = server.service

    async def scenario() -> None:
        sending = asyncio.create_task((await begin(service))(SCOPE, never, never))
        await asyncio.sleep(0.1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert service.places.num_held == 0

    in_server(scenario())
    server.wait_until_idle(5)


def test_what_is_read_is_counted_and_not_kept(server, in_server):
    async def scenario() -> None:
        live = await server.service.speak(LONG, INTERNAL, stream=True)
        heard = []
        async for chunk in live.chunks():
            heard.append(chunk)
            if len(heard) == 5:
                break
        seconds = len(np.concatenate(heard)) / 24_000
        assert live.taken_seconds == pytest.approx(seconds)
        assert not live._ticket._chunks
        live.cancel()

    in_server(scenario())
    server.wait_until_idle(5)


def test_a_cancelled_request_ends_whenever_it_is_cancelled(server, in_server):
    """Before its first chunk, between chunks, and when it is over but not yet read."""
    brief = Request("one", seed=1, max_audio_length_ms=400)

    async def scenario(pause: float) -> None:
        live = await server.service.speak(brief, INTERNAL, stream=True)
        await asyncio.sleep(pause)
        live.cancel()
        try:
            async with asyncio.timeout(10):
                async for _ in live.chunks():
                    pass
        except (RequestCancelledError, ClientGoneError):
            pass

    for pause in (0.0, 0.05, 1.5):
        in_server(scenario(pause))
    server.wait_until_idle(5)
