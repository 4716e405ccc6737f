"""ElevenLabs' API: files, streams, and the times of characters."""

import base64
import dataclasses
import io
import json

import av
import httpx
import numpy as np
import pytest
from hearing import recognize_digits
from serving import SMALL, as_samples, same, serve

from csm_jax import Request, Word
from csm_jax.evaluate.word_errors import count_errors
from csm_jax.inference.alignment.words import word_spans
from csm_jax.serve.audio.encoding import RATED_FORMATS
from csm_jax.serve.settings import Settings

TEXT = "One  two, three four!"
PATH = "/v1/text-to-speech/slt"
NAMES = "characters", "character_start_times_seconds", "character_end_times_seconds"


def convert(server, path: str = "", form: str = "pcm_24000", **fields) -> httpx.Response:
    body = {"text": TEXT, "seed": 4} | fields
    return server.post(f"{PATH}{path}", json=body, params={"output_format": form})


def lines_of(response: httpx.Response) -> list[dict]:
    return [json.loads(line) for line in response.raise_for_status().text.splitlines()]


def join(lines: list[dict], name: str = "alignment") -> dict[str, list]:
    found = [line[name] for line in lines if line[name]]
    return {key: [value for each in found for value in each[key]] for key in NAMES}


def data_of(lines: list[dict]) -> bytes:
    return b"".join(base64.b64decode(line["audio_base64"]) for line in lines)


def check_times(alignment: dict[str, list], words: list[Word], speed: float = 1.0) -> None:
    characters, starts, ends = (alignment[name] for name in NAMES)
    assert "".join(characters) == TEXT
    for (first, last), word in zip(word_spans(TEXT), words, strict=True):
        found = starts[first], ends[last - 1]
        assert found == pytest.approx((word.start / speed, word.end / speed), abs=2e-3)


@pytest.fixture(scope="module")
def request_in_slt(server) -> Request:
    voice = server.service.voices.find("slt", "")
    return Request(TEXT, voice.speaker, [voice.turn()], seed=4)


@pytest.fixture(scope="module")
def expected(server, request_in_slt):
    return server.service.model.speak(request_in_slt)


@pytest.mark.parametrize("path", ["", "/stream"])
def test_the_speech_is_that_of_the_library(server, expected, path):
    audio = np.frombuffer(convert(server, path).raise_for_status().content, "<i2") / 32768
    np.testing.assert_allclose(audio, np.clip(expected.audio, -1, 1), atol=1e-3)


@pytest.mark.parametrize(
    "form",
    ["mp3_44100_128", "mp3_22050_32", "pcm_16000", "wav_48000", "wav_8000", "opus_48000_64"],
)
@pytest.mark.parametrize("path", ["", "/stream"])
def test_formats_have_their_rate_and_the_words(server, expected, form, path):
    data = convert(server, path, form).raise_for_status().content
    rate = RATED_FORMATS[form].sample_rate
    if form.startswith("pcm"):
        audio = np.frombuffer(data, "<i2").astype(np.float32) / 32768
    else:
        with av.open(io.BytesIO(data)) as file:
            assert file.streams.audio[0].rate == rate
        audio = as_samples(data)
    assert len(audio) / rate == pytest.approx(len(expected.audio) / 24_000, abs=0.1)
    assert count_errors(["one", "two", "three", "four"], recognize_digits(audio, rate)).errors <= 1


@pytest.mark.parametrize(("form", "container"), [("ulaw_8000", "mulaw"), ("alaw_8000", "alaw")])
def test_telephone_formats_are_bare_samples(server, expected, form, container):
    data = convert(server, "", form).raise_for_status().content
    assert len(data) / 8000 == pytest.approx(len(expected.audio) / 24_000, abs=0.02)
    with av.open(io.BytesIO(data), format=container, options={"sample_rate": "8000"}) as file:
        frames = [frame.to_ndarray()[0] for frame in file.decode(audio=0)]
    sound = np.concatenate(frames).astype(np.float32) / 32768
    loudness = np.sqrt(np.mean(sound**2)), np.sqrt(np.mean(expected.audio**2))
    assert loudness[0] == pytest.approx(loudness[1], rel=0.2)


def test_bit_rates_differ(server):
    sizes = [len(convert(server, "", f"mp3_44100_{kbps}").content) for kbps in (32, 128)]
    assert sizes[1] > 3 * sizes[0]


def test_the_times_of_characters_are_those_of_the_words(server, expected):
    response = convert(server, "/with-timestamps").raise_for_status().json()
    check_times(response["alignment"], expected.words)
    assert response["normalized_alignment"] == response["alignment"]
    assert same(base64.b64decode(response["audio_base64"]), convert(server).content)


@pytest.mark.parametrize("speed", [1.0, 1.25])
def test_lines_of_a_stream_have_the_audio_and_times_of_the_words(server, request_in_slt, speed):
    words: list[Word] = []
    server.service.model.generate(request_in_slt, on_word=words.append)
    fields = {"voice_settings": {"speed": speed}}
    lines = lines_of(convert(server, "/stream/with-timestamps", **fields))
    check_times(join(lines), words, speed)
    assert same(data_of(lines), convert(server, "/stream", **fields).content)
    seconds = 0.0
    for line in lines:
        seconds += len(base64.b64decode(line["audio_base64"])) / 48_000
        # They come while they are spoken.
        assert all(seconds - end < 1 for end in (line["alignment"] or {}).get(NAMES[2], []))


def test_speed_divides_the_times(server, expected):
    fields = {"voice_settings": {"speed": 2.0}}
    response = convert(server, "/with-timestamps", **fields).raise_for_status().json()
    check_times(response["alignment"], expected.words, 2.0)


def test_without_a_format_it_is_mp3(server):
    response = server.post(PATH, json={"text": "one"}).raise_for_status()
    assert response.headers["content-type"] == "audio/mpeg"


def test_fields_that_are_not_followed_are_reported(server):
    settings = {"stability": 0.5, "use_speaker_boost": True, "speed": 1.0}
    response = convert(
        server, model_id="eleven_multilingual_v2", voice_settings=settings, language_code="en"
    )
    kinds = set(response.raise_for_status().headers["x-notices"].split(","))
    assert kinds == {"stability_ignored", "use_speaker_boost_ignored", "language_code_ignored"}
    assert "model_ignored" in convert(server, model_id="another").headers["x-notices"]


@pytest.mark.parametrize("path", ["", "/stream", "/with-timestamps", "/stream/with-timestamps"])
@pytest.mark.parametrize(
    ("form", "fields", "code", "message"),
    [
        ("mp3_8000_8", {}, "unsupported_output_format", "'mp3_8000_8'"),
        ("pcm_24000", {"text": "a" * 10_001}, "text_too_long", "10001 characters"),
        ("pcm_24000", {"text": ""}, "string_too_short", "text"),
        ("pcm_24000", {"voice_settings": {"speed": 9}}, "less_than_equal", "voice_settings.speed"),
    ],
)
def test_errors_have_the_form_of_elevenlabs(server, path, form, fields, code, message):
    response = convert(server, path, form, **fields)
    detail = response.json()["detail"]
    assert response.status_code == 400
    assert (detail["code"], detail["status"]) == (code, code)
    assert message in detail["message"]


def test_a_voice_that_does_not_exist_is_an_error(server):
    response = server.post("/v1/text-to-speech/nobody", json={"text": TEXT})
    assert (response.status_code, response.json()["error"]["param"]) == (400, None)
    assert "no voice 'nobody'" in response.json()["detail"]["message"]


def test_voices_of_elevenlabs_stand_for_presets(server):
    """Rachel is the second of them, as the women's voice is of the presets."""
    url = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM?output_format=pcm_24000"
    response = server.post(url, json={"text": TEXT, "seed": 4})
    assert response.content == convert(server).content


@pytest.mark.parametrize("version", [1, 2])
def test_voices_are_listed(server, version):
    listed = server.get(f"/v{version}/voices").raise_for_status().json()
    names = [voice["name"] for voice in server.get("/v1/audio/voices").json()["voices"]]
    assert [voice["voice_id"] for voice in listed["voices"]] == names
    assert listed["total_count"] == len(names)


def test_a_normalized_text_keeps_the_characters_that_were_written(model):
    text = "**1** 2 [pause:0.2s] $3"
    with serve(model, Settings(**SMALL, normalize=True)) as running:
        path = f"{PATH}/with-timestamps?output_format=pcm_24000"
        whole = running.post(path, json={"text": text, "seed": 4}).raise_for_status().json()
        path = f"{PATH}/stream/with-timestamps?output_format=pcm_24000"
        lines = lines_of(running.post(path, json={"text": text, "seed": 4}))
    for each in (lambda name: whole[name], lambda name: join(lines, name)):
        assert "".join(each("alignment")["characters"]) == text
        assert "".join(each("normalized_alignment")["characters"]) == "one two three dollars"
        starts = each("alignment")["character_start_times_seconds"]
        assert starts == sorted(starts)
        assert starts[text.index("$3")] > starts[text.index("2 ")]


def test_without_alignment_heads_times_are_refused_and_speech_is_not(model):
    with serve(dataclasses.replace(model, alignment=None), Settings(**SMALL)) as running:
        for path in ("/with-timestamps", "/stream/with-timestamps"):
            response = convert(running, path)
            assert (response.status_code, response.json()["detail"]["code"]) == (400, "no_words")
        convert(running, max_audio_length_ms=400).raise_for_status()
