"""VoxServe's API, by curl and httpx."""

import base64
import json
import time

import numpy as np
import pytest
from hearing import median_pitch
from serving import as_samples, same

from csm_jax.model.sampling import Sampling
from csm_jax.serve.api.schemas import Options

FIELDS = {"text": "one two three", "speaker": 0, "seed": 5}


def generate(server, **fields):
    return server.post("/generate", json=FIELDS | fields)


def test_json_and_form_give_the_same_speech(server):
    response = generate(server)
    assert response.headers["content-type"] == "audio/wav"
    form = server.post("/generate", files={k: (None, str(v)) for k, v in FIELDS.items()})
    assert same(form.content, response.content)
    assert len(as_samples(response.content)) > 12_000


def test_a_stream_equals_the_whole(server):
    streamed, whole = generate(server, streaming=True), generate(server)
    assert streamed.headers.get("transfer-encoding") == "chunked"
    # The head of a stream has no length.
    assert same(streamed.content, whole.content)
    assert streamed.content[:4] == b"RIFF"


def test_curl_gets_a_wav_file(server, tmp_path, run):
    for more in ("", "-F streaming=true"):
        out = tmp_path / "out.wav"
        run(f"curl -s -X POST {server.url}/generate -F text=one -F speaker=1 {more} -o {out}")
        assert len(as_samples(out.read_bytes())) > 5_000


@pytest.mark.parametrize("field", ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
def test_sampling_is_per_request(server, field):
    values = {"temperature": 0.1, "top_p": 0.3, "top_k": 1, "min_p": 0.5, "repetition_penalty": 3}
    assert not same(generate(server, **{field: values[field]}).content, generate(server).content)


def test_temperature_0_is_greedy(server):
    first, second = (generate(server, temperature=0, seed=seed).content for seed in (1, 2))
    assert same(first, second)


def test_a_temperature_overrides_a_greedy_default():
    default = Sampling(greedy=True, top_k=7)
    assert Options().sampling(default) == default
    assert Options(temperature=0.5).sampling(default) == Sampling(0.5, top_k=7)
    assert Options(temperature=0).sampling(Sampling(top_k=7)).greedy


@pytest.mark.parametrize("has_text", [True, False])
@pytest.mark.parametrize("kind", ["json", "form"])
def test_context_audio_gives_the_voice(server, recording, transcript, kind, has_text):
    """Speaker 0 is slt by default, and rms after a turn of rms."""
    fields = {"text": "one two three four"} | ({"audio_text": transcript} if has_text else {})
    if kind == "json":
        response = generate(server, **fields, audio=base64.b64encode(recording).decode())
    else:
        response = server.post(
            "/generate", data=FIELDS | fields, files={"audio": ("rms.flac", recording)}
        )
    plain = generate(server, text="one two three four")
    assert ("no_transcript" in response.headers.get("x-notices", "")) != has_text
    assert median_pitch(as_samples(response.content), 24_000) < 130
    assert median_pitch(as_samples(plain.content), 24_000) > 130


def test_a_voice_by_name(server):
    response = generate(server, voice="rms", text="one two three four")
    assert median_pitch(as_samples(response.content), 24_000) < 130


def test_a_cut_is_reported_in_x_notices(server):
    response = generate(server, max_audio_length_ms=240)
    assert len(as_samples(response.content)) == 3 * 1920
    assert response.headers["x-notices"] == "cut"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ""}, "text"),
        ({"speaker": -1}, "speaker"),
        ({"voice": "nobody"}, "no voice 'nobody'"),
        ({"audio": "AAAA"}, "audio: not readable as audio"),
        ({"audio": "AAAA", "audio_text": "Hi."}, "not readable as audio"),
        ({"audio": "!", "audio_text": "Hi."}, "not base64"),
        ({"streaming": "perhaps"}, "streaming"),
        ({"min_p": 1}, "min_p"),
    ],
)
def test_errors_name_the_invalid_field(server, fields, message):
    response = generate(server, **fields)
    assert response.status_code == 400
    assert message in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"hello", "text/plain", 415),
        (b"hello", "multipart/form-data", 400),
        (b"hello", "multipart/form-data; boundary=x", 400),
    ],
)
def test_unsupported_bodies_are_refused(server, body, kind, status):
    response = server.post("/generate", content=body, headers={"Content-Type": kind})
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "detail"}


def test_responses_have_a_request_id(server):
    response = server.post("/generate", json=FIELDS, headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    forged = server.post("/generate", json=FIELDS, headers={"X-Request-Id": "a b\tc"})
    assert len(forged.headers["x-request-id"]) == 32


def test_the_log_line_has_the_latencies(server, caplog):
    with caplog.at_level("INFO", logger="csm_jax.serve"):
        name = generate(server).headers["x-request-id"]
        # It is written after the client has received the response.
        deadline = time.monotonic() + 10
        while not any(name in record.message for record in caplog.records):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    [line] = [json.loads(each.message) for each in caplog.records if name in each.message]
    assert line["path"] == "/generate"
    assert line["status"] == 200
    parts = [line[f"{part}_s"] for part in ("queue", "prefill", "frames", "codec", "encode")]
    assert min(parts[1:]) > 0
    assert sum(parts) <= line["total_s"] + 0.01
    assert line["audio_s"] == pytest.approx(np.round(line["audio_s"] / 0.08) * 0.08)
