"""Packages of npm, unchanged: fal's client and the AI SDK."""

import base64
import json

import httpx
from hearing import recognize_digits
from serving import as_samples
from test_python_clients import TEXT, check_speech
from word_errors import count_errors

SCENE = [{"text": "one two three", "speaker_id": 0}, {"text": "four five", "speaker_id": 1}]


def test_fal_subscribe(server, node):
    found = node("fal.js", server.url, "id:secret", json.dumps(SCENE))
    assert found["updates"][-1] == "COMPLETED"
    assert set(found["updates"]) <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
    assert "line 2 of 2 spoken" in found["logs"]
    assert found["requestId"]
    audio = found["data"]["audio"]
    assert audio["content_type"] == "audio/wav"
    samples = as_samples(httpx.get(audio["url"]).content)
    assert (
        count_errors(["one", "two", "three", "four", "five"], recognize_digits(samples, 24_000))
        <= 1
    )


def test_the_ai_sdk(server, node):
    found = node("ai_sdk.js", server.url, TEXT, "ash")
    check_speech(as_samples(base64.b64decode(found["audio"])))
    assert found["mediaType"].startswith("audio/")
