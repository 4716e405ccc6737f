"""The real `openai` client against the server, unchanged."""

import base64
import io
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import openai
import pytest
from hearing import recognize_digits
from serving import as_samples, same

from csm_jax import Request
from csm_jax.evaluate.word_errors import count_errors

TEXT = "one two three four"
# The same seed gives the same speech.
SEED = {"seed": 4}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client, **fields):
    fields = {"model": "csm-1b", "input": TEXT, "voice": "slt", "extra_body": SEED} | fields
    return client.audio.speech.create(**fields)


@pytest.fixture(scope="module")
def expected(server):
    """The speech of the library for the same request."""
    voice = server.service.voices.find("slt", "")
    return server.service.model.generate(
        Request(TEXT, voice.speaker, [voice.turn()], seed=4, max_audio_length_ms=10_000)
    )


def test_the_speech_equals_that_of_the_library(client, expected):
    audio = np.frombuffer(create(client, response_format="pcm").content, "<i2") / 32768
    assert len(audio) == len(expected)
    np.testing.assert_allclose(audio, np.clip(expected, -1, 1), atol=1e-3)
    recognized = recognize_digits(audio.astype(np.float32), 24_000)
    assert count_errors(TEXT.split(), recognized).errors <= 1


def decode(data: bytes, form: str) -> np.ndarray:
    """Decodes by ffmpeg, which knows all formats, to float32 [num_samples] at 24 kHz."""
    if form == "pcm":
        return np.frombuffer(data, "<i2") / 32768
    resampler = av.AudioResampler("flt", "mono", 24_000)
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.audio[0].codec_context.name.startswith(form.replace("wav", "pcm"))
        frames = [part for each in file.decode(audio=0) for part in resampler.resample(each)]
    frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


@pytest.mark.parametrize("form", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
def test_every_format_has_the_length_and_loudness_of_the_speech(client, expected, form):
    response = create(client, response_format=form)
    audio = decode(response.content, form)
    # Codecs add a little silence, and change the waveform, but not its loudness.
    assert 0 <= len(audio) - len(expected) < 0.15 * 24_000
    loudness = [np.sqrt(np.mean(np.square(each))) for each in (audio, expected)]
    assert loudness[0] == pytest.approx(loudness[1], rel=0.15)


def test_the_client_can_stream(client, expected):
    """Pieces arrive during generation, and together equal the whole."""
    with client.audio.speech.with_streaming_response.create(
        model="csm-1b", input=TEXT, voice="slt", response_format="pcm", extra_body=SEED
    ) as response:
        pieces = list(response.iter_bytes())
    assert len(pieces) > 2
    audio = np.frombuffer(b"".join(pieces), "<i2") / 32768
    np.testing.assert_allclose(audio, np.clip(expected, -1, 1), atol=1e-3)


@pytest.mark.parametrize("form", ["wav", "mp3", "opus"])
def test_a_stream_with_a_seed_has_the_same_bytes_every_time(server, form):
    body = {"model": "tts-1", "input": TEXT, "voice": "slt", "response_format": form, **SEED}

    def stream(_):
        response = server.post("/v1/audio/speech", json=body | {"stream_format": "sse"})
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line]
        return b"".join(base64.b64decode(event.get("audio", "")) for event in events)

    alone = [stream(i) for i in range(2)]
    with ThreadPoolExecutor(4) as pool:
        assert {*alone, *pool.map(stream, range(8))} == {alone[0]}


def test_events_carry_the_same_bytes(server, client):
    body = {"model": "tts-1", "input": TEXT, "voice": "slt", "response_format": "wav", **SEED}
    response = server.post("/v1/audio/speech", json=body | {"stream_format": "sse"})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line]
    pieces = [base64.b64decode(event["audio"]) for event in events[:-1]]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    whole = server.post("/v1/audio/speech", json=body).content
    assert same(b"".join(pieces), whole)
    usage = events[-1]["usage"]
    assert events[-1]["type"] == "speech.audio.done"
    assert usage["output_tokens"] == len(as_samples(whole)) / 1920
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.parametrize("speed", [0.25, 0.5, 2.0, 4.0])
def test_speed_divides_the_length(client, expected, speed):
    response = create(client, response_format="pcm", speed=speed)
    assert len(response.content) / 2 == pytest.approx(len(expected) / speed, rel=0.03)


def test_every_form_of_a_voice_is_understood(server, client):
    """Presets, OpenAI's names for them, objects, and numbers without a preset."""

    def speech(voice):
        return create(client, voice=voice, response_format="pcm").content

    slt, rms, one, other = (speech(voice) for voice in ("slt", "rms", "0", "1"))
    assert same(slt, speech("ash"))  # the second preset of rms and slt
    assert same(slt, speech({"id": "slt"}))
    assert same(rms, speech("alloy"))
    assert not any(same(*pair) for pair in itertools.combinations([slt, rms, one, other], 2))


def test_the_model_is_listed_with_its_sampling(client):
    assert [model.id for model in client.models.list()] == ["csm-1b"]
    assert client.models.retrieve("csm-1b").id == "csm-1b"
    sampling = client.models.retrieve("csm-1b").sampling
    assert (sampling["temperature"], sampling["top_k"]) == (0.9, 50)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("whisper-1")


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"input": ""}, openai.BadRequestError, "input"),
        ({"input": "   "}, openai.BadRequestError, None),
        ({"input": "a" * 10_001}, openai.BadRequestError, "text"),
        ({"voice": "nobody"}, openai.BadRequestError, None),
        ({"speed": 5}, openai.BadRequestError, "speed"),
        ({"response_format": "midi"}, openai.BadRequestError, "response_format"),
        ({"extra_body": {"temperature": -1}}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"top_k": 0}}, openai.BadRequestError, "top_k"),
        ({"extra_body": {"seed": "x"}}, openai.BadRequestError, "seed"),
        ({"extra_body": {"max_audio_length_ms": 7e5}}, openai.BadRequestError, None),
    ],
)
def test_errors_are_those_that_openai_clients_expect(client, fields, kind, param):
    with pytest.raises(kind) as raised:
        create(client, **fields)
    assert raised.value.param == param
    assert raised.value.body["message"]
    assert raised.value.type in ("invalid_request_error", "not_found_error")
    assert raised.value.request_id


def test_a_disconnect_frees_the_slot(server, client):
    """Within about a frame, although most of the speech is missing."""
    body = {"max_audio_length_ms": 60_000, "temperature": 5}
    with client.audio.speech.with_streaming_response.create(
        model="csm-1b", input=TEXT * 20, voice="slt", response_format="pcm", extra_body=body
    ) as response:
        next(response.iter_bytes())
        assert server.service.engine.num_running == 1
    server.wait_until_idle(seconds=2)


def test_the_documented_curl_command_works(server, tmp_path, run):
    out = tmp_path / "speech.mp3"
    run(
        f"curl -s {server.url}/v1/audio/speech -H 'Authorization: Bearer none' "
        "-H 'Content-Type: application/json' -d "
        '\'{"model": "gpt-4o-mini-tts", "input": "one two", "voice": "coral"}\' '
        f"--output {out}"
    )
    assert len(as_samples(out.read_bytes())) > 10_000
