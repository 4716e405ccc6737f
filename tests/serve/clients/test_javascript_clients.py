"""Packages of npm, unchanged: fal's client, the AI SDK and OpenAI's client."""

import base64
import json

import httpx
import numpy as np
from hearing import recognize_digits
from serving import as_samples
from test_python_clients import TEXT, check_speech, from_pcm

from csm_jax.evaluate.word_errors import count_errors

SCENE = [{"text": "one two three", "speaker_id": 0}, {"text": "four five", "speaker_id": 1}]


def test_fal_subscribe(server, node):
    found = node("fal.js", server.url, "id:secret", json.dumps(SCENE))
    assert found["updates"][-1] == "COMPLETED"
    assert set(found["updates"]) <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
    assert "line 2 of 2 spoken" in found["logs"]
    assert found["requestId"]
    audio = found["data"]["audio"]
    assert audio["content_type"] == "audio/wav"
    data = httpx.get(audio["url"]).content
    words = ["one", "two", "three", "four", "five"]
    assert count_errors(words, recognize_digits(as_samples(data), 24_000)).errors <= 2
    direct = server.post("/fal-ai/csm-1b", json={"scene": SCENE, "seed": 3}).json()
    assert httpx.get(direct["audio"]["url"]).content == data


def test_the_ai_sdk(server, node):
    found = node("ai_sdk.js", server.url, TEXT, "ash")
    check_speech(as_samples(base64.b64decode(found["audio"])))
    assert found["mediaType"].startswith("audio/")


def test_openai_chat(server, node):
    found = node("openai.js", server.url, TEXT, "ash")
    assert found["audio"]["transcript"] == TEXT
    whole = as_samples(base64.b64decode(found["audio"]["data"]))
    check_speech(whole)
    streamed = from_pcm(found["pcm"])
    np.testing.assert_allclose(streamed, whole, atol=2 / 32768)
