"""Recordings of a context: those that can fit the window are decoded, until the client leaves."""

import asyncio
import base64
import io
import time

import httpx
import numpy as np
import pytest
import soundfile

from csm_jax import Request, Segment
from csm_jax.mimi.codec import Codec
from csm_jax.serve.admission.caller import INTERNAL, Caller
from csm_jax.serve.api import context as context_module
from csm_jax.serve.api.context import UploadedTurn, read_context
from csm_jax.serve.errors import ApiError

RATE = 24_000
PATH = "/fal-ai/csm-1b"


def flac(seconds: float, seed: int = 0) -> bytes:
    """A long recording of clicks, which is a small file."""
    samples = np.zeros(int(seconds * RATE), np.float32)
    samples[:: RATE // 2] = 0.5
    samples[seed] = 0.25  # each recording is different
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC")
    return file.getvalue()


def uri(data: bytes) -> str:
    return "data:audio/flac;base64," + base64.b64encode(data).decode()


def scene(*recordings: str, **more) -> dict:
    turns = [{"prompt": "one", "audio_url": each, "speaker_id": 1} for each in recordings]
    return {"scene": [{"text": "two"}], "context": turns, "seed": 1, **more}


@pytest.fixture
def work(monkeypatch):
    """Counts the decoded recordings and the encoded turns; encoding is slowed down."""
    counts = {"decoded": [], "encoded": [], "pause": 0.0}
    decode, encode = context_module.decode_upload, Codec.encode

    def note_decode(*arguments):
        audio = decode(*arguments)
        counts["decoded"].append(audio)
        return audio

    def note_encode(codec, audio, *more):
        counts["encoded"].append(audio)
        time.sleep(counts["pause"])
        return encode(codec, audio, *more)

    monkeypatch.setattr(context_module, "decode_upload", note_decode)
    monkeypatch.setattr(Codec, "encode", note_encode)
    return counts


def read(server, given: list[UploadedTurn]):
    """Calls `read_context` in the event loop of the server."""
    service = server.service
    loop = service.warmed.get_loop()
    reading = read_context(service, INTERNAL, given, "audio")
    return asyncio.run_coroutine_threadsafe(reading, loop).result(60)


def test_the_first_and_the_newest_recordings_are_decoded_until_the_window_is_full(server, work):
    """The window of 256 positions is 20.48 s: four of 6 s, after the first of each speaker."""
    given = [UploadedTurn(i % 2, f"turn {i}", flac(6.0, i + 1)) for i in range(9)]
    found = read(server, given)
    assert [turn.text for turn in found.turns] == [f"turn {i}" for i in (0, 1, 5, 6, 7, 8)]
    assert [int(np.argmax(turn.audio == 0.25)) for turn in found.turns] == [1, 2, 6, 7, 8, 9]
    assert len(work["decoded"]) == 6
    (notice,) = found.notices
    assert notice.kind == "context_dropped"
    assert "3 of 9 turns" in notice.message


def test_recordings_that_fit_are_decoded_in_full(server, work):
    given = [
        UploadedTurn(0, "a", flac(2.0)),
        UploadedTurn(1, "b", base64.b64encode(flac(3.0)).decode()),
    ]
    found = read(server, given)
    assert [len(turn.audio) for turn in found.turns] == [2 * RATE, 3 * RATE]
    assert found.notices == []


def test_only_the_recordings_that_fit_are_encoded(server, work):
    """64 times 59 s in half a megabyte: the first and the last are decoded, and none fits."""
    recording = uri(flac(59.0))
    response = server.post(PATH, json=scene(*[recording] * 64, max_audio_length_ms=400))
    assert response.status_code == 200
    assert len(work["decoded"]) == 2
    assert len(work["encoded"]) <= 1


def test_recordings_beyond_the_window_are_checked_too(server, work):
    for bad, reason in (("data:audio/flac;base64,?", "base64"), (uri(b"RIFF"), "not readable")):
        response = server.post(PATH, json=scene(bad, *[uri(flac(25.0))] * 2))
        assert response.status_code == 400
        assert reason in response.json()["detail"]
    too_long = server.post(PATH, json=scene(uri(flac(61.0)), uri(flac(25.0))))
    assert "longer than 60 s" in too_long.json()["detail"]
    assert len(work["encoded"]) == 0


def test_the_lines_of_a_scene_share_encoded_recordings(server, work):
    """Their speech equals that of the library with the same turns."""
    recordings = [flac(2.0, 3), flac(3.0, 4)]
    body = scene(*map(uri, recordings), max_audio_length_ms=400)
    body["scene"] = [{"text": "two"}, {"text": "three"}, {"text": "four"}]
    assert server.post(PATH, json=body).status_code == 200
    assert len(work["encoded"]) == 2


def test_nothing_is_encoded_after_the_client_has_disconnected(server, work):
    work["pause"] = 0.3
    recordings = [uri(flac(1.5, seed)) for seed in range(1, 11)]

    async def ask_and_leave() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            asking = asyncio.create_task(client.post(server.url + PATH, json=scene(*recordings)))
            async with asyncio.timeout(60):
                while not work["encoded"]:
                    await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(ask_and_leave())
    deadline = time.monotonic() + 20
    while server.service.request_limiter.num_acquired:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begun = len(work["encoded"])
    time.sleep(1.0)
    assert len(work["encoded"]) == begun < 10


def test_encoding_alternates_between_callers(server, work):
    """Its ten turns take four seconds to encode."""
    service = server.service
    work["pause"] = 0.4
    loop = service.warmed.get_loop()
    turns = [Segment(0, "one", np.full(RATE, 0.1 + i / 100, np.float32)) for i in range(10)]
    many = service.encode_context(Request("two", context=turns), Caller(share="many"))
    flood = asyncio.run_coroutine_threadsafe(many, loop)
    deadline = time.monotonic() + 20
    while not work["encoded"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    own = np.full(RATE, 0.9, np.float32)
    asyncio.run_coroutine_threadsafe(service.encode(own, Caller(share="new")), loop).result(60)
    order = [float(audio[0]) for audio in work["encoded"]]
    assert order.index(np.float32(0.9)) <= 2
    assert not flood.done()
    assert len(flood.result(60).context) == 10


def test_nothing_is_decoded_without_a_permit(server, work):
    service = server.service
    loop = service.warmed.get_loop()

    async def take_all() -> list:
        places = []
        while True:
            try:
                places.append(await service.admit(INTERNAL))
            except ApiError:
                return places

    async def give_back(places: list) -> None:
        for place in places:
            place.release()

    recording = uri(flac(1.5))
    places = asyncio.run_coroutine_threadsafe(take_all(), loop).result(10)
    # Callers with another share could still get one of the spare permits.
    more = asyncio.run_coroutine_threadsafe(_fill(service), loop).result(10)
    try:
        asked = {
            PATH: scene(recording),
            "/generate": {"text": "one", "audio": recording, "audio_text": "two"},
            "/v1/inference/sesame/csm-1b": {
                "text": "one",
                "speaker_audio": recording,
                "speaker_transcript": "two",
            },
            "/v1/audio/voices": {"name": "new", "text": "one", "audio": recording},
            "/v1/audio/speech": {"model": "tts-1", "input": "one", "voice": "alloy"},
        }
        for path, body in asked.items():
            response = server.post(path, json=body)
            assert response.status_code == 429, path
            assert response.json()["error"]["code"] == "queue_full"
            assert int(response.headers["retry-after"]) >= 1
    finally:
        asyncio.run_coroutine_threadsafe(give_back(places + more), loop).result(10)
    assert not work["decoded"]
    assert not work["encoded"]
    assert server.post("/generate", json={"text": "one", "seed": 1}).status_code == 200


async def _fill(service) -> list:
    places = []
    for number in range(service.request_limiter.total):
        try:
            places.append(await service.admit(Caller(share=f"other {number}")))
        except ApiError:
            break
    return places
