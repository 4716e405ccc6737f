"""A server that is ready compiles nothing any more, for any request."""

import base64
import json
import time

import jax
import numpy as np
import pytest
from serving import READY_SECONDS, as_wav, serve

import csm_jax
from csm_jax.serve.settings import Settings

COMPILED: list[str] = []


def noise(seconds: float) -> np.ndarray:
    """float32 [num_samples] at 24 kHz."""
    drawn = np.random.default_rng(0).standard_normal(int(24_000 * seconds))
    return (0.1 * drawn).astype(np.float32)


def _note(event: str, seconds: float, **more: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(str(more))


jax.monitoring.register_event_duration_secs_listener(_note)
LONG = "one two three four five six seven eight nine. " * 9
BRIEF = {"max_audio_length_ms": 6000, "seed": 1}


@pytest.fixture(scope="module")
def ready(shallow):
    """A server with sizes for which no other test of this process has compiled."""
    model = csm_jax.load(shallow)
    with serve(model, Settings(max_batch=3, max_seq_len=384), warm=True) as running:
        yield running


@pytest.fixture
def nothing_compiled():
    COMPILED.clear()
    yield
    assert not COMPILED


def as_base64(seconds: float) -> str:
    return base64.b64encode(as_wav(noise(seconds))).decode()


@pytest.mark.long
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("voice", ["slt", None])
def test_a_long_text_compiles_nothing(ready, nothing_compiled, streaming, voice):
    body = {"text": LONG, "streaming": streaming, "voice": voice, "max_audio_length_ms": 30_000}
    assert ready.post("/generate", json=body).status_code == 200


@pytest.mark.parametrize("speaker", [0, 2**31 - 1])
def test_a_voice_with_any_speaker_number_compiles_nothing(ready, nothing_compiled, speaker):
    body = BRIEF | {"text": "one", "voice": "rms", "speaker": speaker}
    assert ready.post("/generate", json=body).status_code == 200


def test_a_recording_of_any_length_compiles_nothing(ready, nothing_compiled):
    for seconds in (0.15, 0.4, 1.1, 2.7, 6.0, 11.0, 25.0):
        body = BRIEF | {"text": "one", "audio": as_base64(seconds), "audio_text": "two"}
        assert ready.post("/generate", json=body).status_code == 200


def test_a_scene_compiles_nothing(ready, nothing_compiled):
    uri = "data:audio/wav;base64," + as_base64(2.0)
    context = [{"prompt": "one", "audio_url": uri, "speaker_id": i % 2} for i in range(9)]
    scene = [{"text": "two"}, {"text": "three", "speaker_id": 1}]
    body = BRIEF | {"scene": scene, "context": context, "max_audio_length_ms": 800}
    assert ready.post("/fal-ai/csm-1b", json=body).status_code == 200


def test_any_sampling_compiles_nothing(ready, nothing_compiled):
    for more in ({"temperature": 0}, {"top_k": 3}, {"top_p": 0.5, "repetition_penalty": 1.2}):
        assert ready.post("/generate", json=BRIEF | {"text": "one"} | more).status_code == 200


def test_a_line_of_a_batch_compiles_nothing(ready, nothing_compiled):
    spoken = {"model": "tts-1", "input": "one", "voice": "slt", "max_audio_length_ms": 800}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/audio/speech", "body": spoken}
    made = ready.post("/v1/batches", files={"file": json.dumps(line).encode()})
    assert made.status_code == 200
    deadline = time.monotonic() + READY_SECONDS
    while ready.get(f"/v1/batches/{made.json()['id']}").json()["status"] != "completed":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_speech_in_an_added_voice_compiles_nothing(ready):
    """Its programs are compiled before the voice is available."""
    body = {"name": "new", "text": "one two three", "audio": as_base64(9.0)}
    assert ready.post("/v1/audio/voices", json=body).status_code == 201
    assert COMPILED, "no longer than the others: this shows nothing"
    COMPILED.clear()
    response = ready.post("/generate", json=BRIEF | {"text": LONG, "voice": "new"})
    assert response.status_code == 200
    assert not COMPILED
