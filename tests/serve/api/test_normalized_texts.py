"""A server with `--normalize`: texts as they are read aloud, and pauses that the model hears."""

import base64
import dataclasses

import numpy as np
import pytest
from serving import SMALL, as_samples, serve

from csm_jax import Conversation, Request
from csm_jax.serve.settings import Settings

pytest.importorskip("num2words")

SEED = 7
WRITTEN = "**three** 1 [pause:0.8s] 4 😀"
SPOKEN = "three one [pause:0.8s] four"


@pytest.fixture(scope="module")
def normalizing(model):
    with serve(model, Settings(**SMALL, normalize=True)) as running:
        yield running


def speech(server, text: str) -> np.ndarray:
    body = {"input": text, "voice": "0", "response_format": "wav", "seed": SEED}
    response = server.post("/v1/audio/speech", json=body)
    assert response.status_code == 200, response.text
    return as_samples(response.content)


def test_texts_are_spoken_as_they_are_read_aloud(normalizing, server, model):
    request = Request(SPOKEN, pauses=True, seed=SEED, max_audio_length_ms=10_000)
    wanted = np.clip(model.generate(request), -1, 1)
    np.testing.assert_allclose(speech(normalizing, WRITTEN), wanted, atol=1e-4)
    # Without the flag, texts are spoken as they are.
    plain = np.clip(model.generate(dataclasses.replace(request, text=WRITTEN, pauses=False)), -1, 1)
    np.testing.assert_allclose(speech(server, WRITTEN), plain, atol=1e-4)


def test_a_chat_goes_on_from_the_transcript(normalizing, model):
    """The client sends its own text back, which is no turn of its own."""

    def complete(*messages: dict) -> dict:
        body = {"messages": messages, "audio": {"voice": "0", "format": "wav"}, "seed": SEED}
        response = normalizing.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["audio"]

    first = complete({"role": "user", "content": WRITTEN})
    assert first["transcript"] == "three one four"
    second = complete(
        {"role": "user", "content": WRITTEN},
        {"role": "assistant", "audio": {"id": first["id"]}},
        {"role": "user", "content": "2"},
    )
    conversation = Conversation(model, max_audio_length_ms=10_000, pauses=True)
    conversation.speak(SPOKEN, 0, seed=SEED)
    assert conversation.turns[0].text == "three one four"
    wanted = np.clip(conversation.speak("two", 0, seed=SEED), -1, 1)
    data = as_samples(base64.b64decode(second["data"]))
    np.testing.assert_allclose(data, wanted, atol=1e-4)


def test_pauses_that_are_too_long_are_refused(normalizing):
    body = {"input": "one [pause:90s] two", "voice": "0"}
    response = normalizing.post("/v1/audio/speech", json=body)
    assert response.status_code == 400
    assert "at most 60 s are possible" in response.json()["error"]["message"]
