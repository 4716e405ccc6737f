"""A server with a watermark marks whole and streamed speech of all formats."""

import io

import numpy as np
import pytest
import serving
import soundfile

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


@pytest.mark.parametrize("audio_format", ["wav", "mp3", "opus"])
def test_speech_is_marked_in_every_format(servers, audio_format):
    plain, marked = (
        soundfile.read(io.BytesIO(_speech(server, response_format=audio_format)))[0]
        for server in servers
    )
    assert len(plain) == len(marked)
    assert np.abs(plain - marked).max() > 0.01


def test_events_carry_marked_speech(servers):
    plain, marked = (_speech(server, stream_format="sse") for server in servers)
    assert plain != marked
