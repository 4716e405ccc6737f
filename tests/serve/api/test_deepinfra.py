"""DeepInfra's API, with and without a webhook."""

import base64
import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hearing import median_pitch
from serving import SMALL, as_samples, serve

from csm_jax.serve.api import deepinfra
from csm_jax.serve.jobs import webhooks as webhook
from csm_jax.serve.settings import Settings

PATH = "/v1/inference/sesame/csm-1b"
FIELDS = {"text": "one two three four", "seed": 3}
SECRET = "a secret"


def infer(server, **fields):
    return server.post(PATH, json=FIELDS | fields)


def audio_of(response: dict) -> bytes:
    head, _, data = response["audio"].partition(",")
    assert head.startswith("data:audio/")
    assert head.endswith(";base64")
    return base64.b64decode(data)


def test_the_response_has_the_fields_of_deepinfra(server):
    response = infer(server).json()
    audio = as_samples(audio_of(response))
    assert response["input_character_length"] == len(FIELDS["text"])
    assert response["output_format"] == "wav"
    assert [word["text"] for word in response["words"]] == FIELDS["text"].split()
    assert response["request_id"]
    status = response["inference_status"]
    assert set(status) == {"status", "runtime_ms", "cost", "tokens_generated", "tokens_input"}
    assert status["status"] == "succeeded"
    assert status["tokens_generated"] == len(audio) / 1920
    assert status["runtime_ms"] > 0


@pytest.mark.parametrize("form", ["mp3", "opus", "flac", "wav", "pcm"])
def test_every_format_is_written(server, form):
    data = audio_of(infer(server, response_format=form).json())
    starts = {"mp3": b"ID3", "opus": b"OggS", "flac": b"fLaC", "wav": b"RIFF", "pcm": b""}
    assert data.startswith(starts[form])
    assert len(data) > 2000


def test_names_of_presets_stand_for_the_voices_of_the_server(server):
    """Names of the released model stand for presets; the server's presets have their own names."""
    pitches = {
        name: median_pitch(as_samples(audio_of(infer(server, preset_voice=name).json())), 24_000)
        for name in ("rms", "conversational_a", "slt", "conversational_b")
    }
    assert pitches["rms"] == pitches["conversational_a"] < 130
    assert pitches["slt"] == pitches["conversational_b"] > 130
    assert infer(server, preset_voice="none").status_code == 200
    assert infer(server, preset_voice="nobody").status_code == 400


def test_no_preset_is_the_default(server):
    """As documented: the first call speaks in any voice."""
    plain = server.post("/generate", json=FIELDS | {"temperature": 0.9, "speaker": 0})
    for fields in ({}, {"preset_voice": None}, {"preset_voice": "None"}):
        assert audio_of(infer(server, **fields).json()) == plain.content


def test_the_default_voice_of_the_server_is_the_preset(model):
    settings = Settings(**SMALL, default_voice="slt")
    with serve(model, settings) as running:
        default, named = (infer(running, **more).json() for more in ({}, {"preset_voice": "slt"}))
        none = infer(running, preset_voice="none").json()
    assert audio_of(default) == audio_of(named) != audio_of(none)


@pytest.mark.parametrize("kind", ["multipart", "json"])
def test_a_recording_without_a_transcript_gives_the_voice(server, recording, kind):
    """With a notice."""
    if kind == "multipart":
        files = {"speaker_audio": ("a.flac", recording)}
        response = server.post(PATH, data=FIELDS | {"speaker_transcript": ""}, files=files)
    else:
        response = infer(server, speaker_audio=base64.b64encode(recording).decode())
    assert "no_transcript" in response.headers["x-notices"]
    assert median_pitch(as_samples(audio_of(response.json())), 24_000) < 130


@pytest.mark.parametrize("kind", ["multipart", "json", "data uri"])
def test_a_recording_gives_the_voice(server, recording, transcript, kind):
    fields = FIELDS | {"speaker_transcript": transcript}
    if kind == "multipart":
        response = server.post(PATH, data=fields, files={"speaker_audio": recording})
    else:
        head = "data:audio/flac;base64," if kind == "data uri" else ""
        text = head + base64.b64encode(recording).decode()
        response = server.post(PATH, json=fields | {"speaker_audio": text})
    assert median_pitch(as_samples(audio_of(response.json())), 24_000) < 130


def test_max_audio_length_ms_limits_the_speech(server):
    response = infer(server, max_audio_length_ms=400).json()
    assert len(as_samples(audio_of(response))) == 5 * 1920


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ""}, "text"),
        ({"response_format": "aiff"}, "response_format"),
        ({"speaker_audio": "AAAA"}, "speaker_audio: not readable as audio"),
        ({"speaker_audio": "AAAA", "speaker_transcript": "Hi."}, "speaker_audio"),
        ({"speaker_audio": "data:audio/wav,AA", "speaker_transcript": "Hi."}, "data URI"),
        ({"webhook": "http://localhost/"}, "webhooks are off"),
        ({"max_audio_length_ms": 1}, "max_audio_length_ms"),
    ],
)
def test_errors_name_the_invalid_field(server, fields, message):
    response = infer(server, **fields)
    assert response.status_code == 400
    assert message in response.json()["detail"]


class Listener(BaseHTTPRequestHandler):
    """Records posts, and responds with 500 to the first `failures` of them."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((dict(self.headers), body))
        self.send_response(500 if len(self.server.posts) <= self.server.failures else 200)
        self.end_headers()
        self.server.arrived.set()

    def log_message(self, *_):
        pass


@pytest.fixture
def listener():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    server.posts, server.failures, server.arrived = [], 0, threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def calling(model):
    """A server that can post to this machine, with short pauses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webhook, "PAUSES", (0.05, 0.05))
        settings = Settings(**SMALL, webhook_secret=SECRET, allow_private=True)
        with serve(model, settings) as running:
            yield running


def wait_for_posts(listener, count: int) -> list:
    while len(listener.posts) < count:
        listener.arrived.clear()
        assert listener.arrived.wait(30)
    return listener.posts


@pytest.mark.parametrize("failures", [0, 2])
def test_the_response_is_posted_to_the_webhook_with_a_signature(calling, listener, failures):
    listener.failures = failures
    url = f"http://localhost:{listener.server_port}/done"
    queued = infer(calling, webhook=url)
    assert queued.status_code == 202
    assert queued.json()["inference_status"]["status"] == "queued"
    headers, body = wait_for_posts(listener, failures + 1)[-1]
    response = json.loads(body)
    assert response["request_id"] == queued.json()["request_id"]
    assert audio_of(response) == audio_of(infer(calling).json())
    signed = headers["X-Webhook-Timestamp"].encode() + b"." + body
    expected = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert headers["X-Webhook-Signature"] == f"sha256={expected}"


def test_posts_to_a_failing_webhook_end(calling, listener):
    listener.failures = 9
    infer(calling, webhook=f"http://localhost:{listener.server_port}/")
    wait_for_posts(listener, 3)
    assert not listener.arrived.wait(0.5) or len(listener.posts) == 3


def test_a_failure_is_posted_to_the_webhook(calling, listener):
    url = f"http://localhost:{listener.server_port}/"
    queued = infer(calling, webhook=url, preset_voice="nobody", pitch=3)
    assert (queued.status_code, queued.headers["x-notices"]) == (202, "pitch_ignored")
    response = json.loads(wait_for_posts(listener, 1)[0][1])
    assert response["inference_status"]["status"] == "failed"
    assert "nobody" in response["detail"]


def test_large_bodies_are_read_and_written_outside_the_event_loop(
    calling, listener, recording, transcript, monkeypatch
):
    threads = []

    def noting(function):
        def call(*arguments, **named):
            threads.append(threading.current_thread().name)
            return function(*arguments, **named)

        return call

    for kind, name in (
        (base64, "b64encode"),
        (deepinfra.QueuedInference, "model_validate_json"),
        (deepinfra.QueuedInference, "model_dump_json"),
        (deepinfra.InferenceResponse, "model_dump_json"),
    ):
        monkeypatch.setattr(kind, name, noting(getattr(kind, name)))
    data = {"text": "one", "speaker_transcript": transcript, "response_format": "mp3"}
    files = {"speaker_audio": recording}
    calling.post(deepinfra.PATH, data=data, files=files).raise_for_status()
    data["webhook"] = f"http://localhost:{listener.server_port}/"
    assert calling.post(deepinfra.PATH, data=data, files=files).status_code == 202
    wait_for_posts(listener, 1)
    assert len(threads) == 6
    assert all(name.startswith("csm_jax.serve.work") for name in threads)
