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


def test_dropping_a_slow_client_frees_its_slot_and_its_permit(server, in_server):
    """Although the response is blocked in sending, and the client is still connected."""
    service = server.service

    async def scenario() -> None:
        response = await begin(service)
        assert service.request_limiter.num_acquired == 1
        sending = asyncio.create_task(response(SCOPE, never, never))
        await asyncio.sleep(0.3)
        assert not sending.done()
        speech = response._speech
        assert speech.unread_seconds > 0
        speech.drop()
        await asyncio.wait_for(sending, 5)
        assert speech.unread_seconds == 0
        assert not speech._chunks
        assert service.request_limiter.num_acquired == 0

    in_server(scenario())
    server.wait_until_idle(5)


def test_cancelling_a_response_raises_cancelled_error(server, in_server):
    """As at the end of the server, which is different from a dropped client."""
    service = server.service

    async def scenario() -> None:
        sending = asyncio.create_task((await begin(service))(SCOPE, never, never))
        await asyncio.sleep(0.1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert service.request_limiter.num_acquired == 0

    in_server(scenario())
    server.wait_until_idle(5)


def test_chunks_that_were_read_are_counted_and_not_kept(server, in_server):
    async def scenario() -> None:
        speech = await server.service.speak(LONG, INTERNAL, stream=True)
        chunks = []
        async for chunk in speech.chunks():
            chunks.append(chunk)
            if len(chunks) == 5:
                break
        seconds = len(np.concatenate(chunks)) / 24_000
        assert speech.taken_seconds == pytest.approx(seconds)
        assert not speech._ticket._chunks
        speech.cancel()

    in_server(scenario())
    server.wait_until_idle(5)


def test_a_request_can_be_cancelled_at_any_time(server, in_server):
    """Before its first chunk, between chunks, and after its end while chunks are unread."""
    brief = Request("one", seed=1, max_audio_length_ms=400)

    async def scenario(pause: float) -> None:
        speech = await server.service.speak(brief, INTERNAL, stream=True)
        await asyncio.sleep(pause)
        speech.cancel()
        try:
            async with asyncio.timeout(10):
                async for _ in speech.chunks():
                    pass
        except (RequestCancelledError, ClientGoneError):
            pass

    for pause in (0.0, 0.05, 1.5):
        in_server(scenario(pause))
    server.wait_until_idle(5)
