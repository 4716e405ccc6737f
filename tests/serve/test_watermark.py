"""A server with a watermark marks whole and streamed speech of all formats."""

import base64
import json
import time
from pathlib import Path

import numpy as np
import pytest
import serving
from talking import Talk
from websockets.sync.client import connect

from csm_jax.io.audio import decode_audio
from csm_jax.serve.settings import Settings
from csm_jax.watermark import Watermark, embed
from csm_jax.watermark.checkpoint import random_weights
from csm_jax.watermark.config import tiny

KEY = (9, 8, 7, 6, 5)
BODY = {"model": "csm-1b", "input": "one two", "voice": "0", "seed": 4}


@pytest.fixture(scope="module")
def watermark():
    return Watermark(random_weights(tiny()), KEY, sdr=10.0)


@pytest.fixture(scope="module")
def servers(model, watermark):
    settings = Settings(**serving.SMALL)
    with (
        serving.serve(model, settings) as plain,
        serving.serve(model, settings, watermark=watermark) as marking,
    ):
        yield plain, marking


def _speech(server, **fields):
    response = server.post("/v1/audio/speech", json=BODY | fields)
    assert response.status_code == 200, response.text
    return response.content


def _samples(server, **fields):
    data = _speech(server, response_format="pcm", **fields)
    return np.frombuffer(data, "<i2").astype(np.float32) / 32_768


def test_speech_is_marked(servers, watermark):
    plain, marked = (_samples(server) for server in servers)
    expected = embed(plain, 24_000, watermark.weights, KEY, 10.0)
    assert np.abs(expected - plain).max() > 0.01
    np.testing.assert_allclose(marked, expected.clip(-1, 1), atol=1e-3)


@pytest.mark.parametrize("audio_format", ["wav", "flac", "mp3", "opus"])
def test_speech_is_marked_in_every_format(servers, audio_format):
    path = Path(f"speech.{audio_format}")
    plain, marked = (
        decode_audio(_speech(server, response_format=audio_format), path, 24_000)
        for server in servers
    )
    assert len(plain) == len(marked)
    assert np.abs(plain - marked).max() > 0.01


def test_events_carry_marked_speech(servers):
    plain, marked = (_speech(server, stream_format="sse") for server in servers)
    assert plain != marked


def _voxserve(server):
    return server.post("/generate", json={"text": "one two", "seed": 4}).content


def _deepinfra(server):
    response = server.post("/v1/inference/sesame/csm-1b", json={"text": "one two", "seed": 4})
    return base64.b64decode(response.json()["audio"].partition(",")[2])


def _fal(server):
    body = {"scene": [{"text": "one two", "speaker_id": 0}], "seed": 4}
    url = server.post("/fal-ai/csm-1b", json=body).json()["audio"]["url"]
    return server.get(url.removeprefix(server.url)).content


def _elevenlabs(server):
    body = {"text": "one two", "seed": 4}
    path = "/v1/text-to-speech/0/with-timestamps?output_format=pcm_24000"
    samples = base64.b64decode(server.post(path, json=body).json()["audio_base64"])
    return serving.as_wav(np.frombuffer(samples, "<i2") / 32_768)


def _chat(server):
    body = {
        "model": "csm-1b",
        "modalities": ["text", "audio"],
        "audio": {"voice": "0", "format": "wav"},
        "messages": [{"role": "user", "content": "one two"}],
        "seed": 4,
    }
    message = server.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    return base64.b64decode(message["audio"]["data"])


def _batch(server):
    line = {"custom_id": "a", "body": BODY | {"response_format": "wav"}}
    batch = server.post("/v1/batches", files={"file": json.dumps(line).encode()}).json()
    while batch["status"] == "in_progress":
        time.sleep(0.05)
        batch = server.get(f"/v1/batches/{batch['id']}").json()
    result = server.get(f"/v1/files/{batch['output_file_id']}/content").json()
    return base64.b64decode(result["response"]["body"]["audio"])


def _realtime(server):
    """What the page speaks with, too."""
    with connect(server.url.replace("http", "ws") + "/v1/realtime") as socket:
        talk = Talk(socket)
        talk.send("say", text="one two", seed=4)
        return serving.as_wav(talk.listen()[1])


@pytest.mark.parametrize(
    "speak", [_voxserve, _deepinfra, _fal, _elevenlabs, _chat, _batch, _realtime]
)
def test_the_speech_of_every_api_is_marked(servers, watermark, speak):
    plain, marked = (serving.as_samples(speak(server)) for server in servers)
    expected = embed(plain.astype(np.float32), 24_000, watermark.weights, KEY, 10.0)
    assert np.abs(expected - plain).max() > 0.01
    np.testing.assert_allclose(marked, expected.clip(-1, 1), atol=1e-3)
