"""What clients of OpenAI's speech API send beside the fields that its documentation shows."""

import base64
import io
import itertools
import typing
import wave

import httpx
import numpy as np
import pytest
from hearing import median_pitch
from openai.types.audio import speech_create_params
from serving import SMALL, as_samples, serve

from csm_jax.serve.api import model_names
from csm_jax.serve.api.fields import Fields, ignored
from csm_jax.serve.api.openai import VOICES
from csm_jax.serve.settings import Settings

PATH = "/v1/audio/speech"
FIELDS = {"input": "one two three", "seed": 4, "response_format": "wav"}


def speak(server, **fields) -> httpx.Response:
    response = server.post(PATH, json=FIELDS | fields)
    assert response.status_code == 200, response.text
    return response


def notices(response: httpx.Response) -> list[str]:
    return [kind for kind in response.headers.get("x-notices", "").split(",") if kind]


class TestNull:
    """A field that is null is one that is not given."""

    def test_every_optional_field_of_speech(self, server):
        schema = server.get("/openapi.json").json()["paths"][PATH]["post"]["requestBody"]
        properties = schema["content"]["application/json"]["schema"]["properties"]
        given = dict.fromkeys(properties.keys() - FIELDS.keys()) | {"voice": "slt"}
        assert given["speed"] is None
        expected = speak(server, voice="slt")
        assert speak(server, **given).content == expected.content
        mp3 = speak(server, response_format=None, voice="slt")
        assert mp3.headers["content-type"] == "audio/mpeg"

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            ("/generate", {"text": "one", "speaker": None, "streaming": None, "voice": None}),
            ("/v1/inference/sesame/csm-1b", {"text": "one", "response_format": None}),
            ("/fal-ai/csm-1b", {"scene": [{"text": "one", "speaker_id": None}], "context": None}),
        ],
    )
    def test_in_the_other_apis(self, server, path, fields):
        fields = fields | {"max_audio_length_ms": 240, "temperature": None, "seed": None}
        assert server.post(path, json=fields).status_code == 200

    def test_a_required_field_is_missing(self, server):
        response = server.post(PATH, json={"input": None})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "input")

    def test_a_nested_field(self):
        class Inner(Fields):
            number: int = 3

        class Outer(Fields):
            inner: list[Inner]

        assert Outer.model_validate_json('{"inner": [{"number": null}]}').inner[0].number == 3


class TestVoices:
    def test_every_voice_that_the_client_library_knows(self, server):
        """`openai.types` is the source of the names."""
        hints = typing.get_type_hints(speech_create_params.SpeechCreateParams)
        names = set(_literals(hints["voice"]))
        assert {"alloy", "marin", "verse", "cedar"} <= names
        assert names <= set(VOICES)
        speak(server, voice="marin", max_audio_length_ms=240)

    @pytest.mark.parametrize("name", ["default", "", "  ", "DEFAULT", None])
    def test_the_default_is_the_first_voice(self, server, name):
        expected = speak(server, voice="rms").content
        assert speak(server, voice=name).content == expected
        assert speak(server, voice="Alloy").content == expected

    def test_a_number_is_a_speaker(self, server):
        assert speak(server, voice=0).content == speak(server, voice="0").content

    @pytest.mark.parametrize("name", ["SLT", " slt ", "Slt", {"id": "SLT"}])
    def test_names_are_found_in_any_case(self, server, name):
        assert speak(server, voice=name).content == speak(server, voice="slt").content

    def test_the_other_apis_find_names_in_any_case(self, server):
        fields = {"text": "one two three", "seed": 4}
        one, two = (server.post("/generate", json=fields | {"voice": v}) for v in ("slt", "SLT"))
        assert one.content == two.content

    @pytest.mark.parametrize("name", ["nobody", -1, True, 0.5, [], "9" * 12])
    def test_other_names_are_refused(self, server, name):
        response = server.post(PATH, json=FIELDS | {"voice": name})
        assert response.status_code == 400
        assert "voice" in response.json()["detail"]

    def test_names_that_differ_in_case_only_are_ambiguous_in_another_case(
        self, server, recording, transcript
    ):
        audio = base64.b64encode(recording).decode()
        for name in ("Ann", "ANN"):
            body = {"name": name, "text": transcript, "audio": audio}
            server.post("/v1/audio/voices", json=body).raise_for_status()
        try:
            response = server.post(PATH, json=FIELDS | {"voice": "ann"})
            assert response.status_code == 400
            assert "ANN or Ann" in response.json()["detail"]
            speak(server, voice="Ann", max_audio_length_ms=240)
        finally:
            for name in ("Ann", "ANN"):
                httpx.delete(f"{server.url}/v1/audio/voices/{name}").raise_for_status()


def _literals(hint) -> list[str]:
    """The strings of all literals in a type."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return list(itertools.chain(*map(_literals, typing.get_args(hint))))


class TestModels:
    @pytest.mark.parametrize(
        "name",
        ["csm-1b", "sesame/csm-1b", "Sesame/CSM-1B", "gpt-4o-mini-tts-2025-12-15", "tts-1", None],
    )
    def test_known_names_give_no_notice(self, server, name):
        assert notices(speak(server, model=name, max_audio_length_ms=240, stream=True)) == []

    @pytest.mark.parametrize("name", ["kokoro", "hexgrad/Kokoro-82M", "whisper-1", "tts-1-ultra"])
    def test_others_are_served_with_a_notice(self, server, name):
        response = speak(server, model=name, max_audio_length_ms=240, stream=True)
        assert notices(response) == ["model_ignored"]
        assert server.get(f"/v1/models/{name}").status_code == 404

    def test_a_strict_server_refuses_others(self):
        strict = Settings(strict_models=True, model_name="Mine")
        assert model_names.check_model(strict, "mine") == []
        with pytest.raises(Exception, match=r"no model 'kokoro': ask for Mine") as raised:
            model_names.check_model(strict, "kokoro")
        assert raised.value.status == 404

    def test_a_name_with_a_slash_can_be_retrieved(self, server):
        assert server.get("/v1/models/sesame/csm-1b").json()["id"] == "sesame/csm-1b"


def test_sillytavern(server):
    """The request of its provider "OpenAI Compatible", for which no key was entered.

    From `src/endpoints/openai.js` of SillyTavern/SillyTavern at 00a72b5.
    """
    body = {"input": "one two three four", "response_format": "mp3", "voice": "ash"}
    body |= {"speed": 1, "model": "tts-1"}
    response = server.post(PATH, json=body, headers={"Authorization": "Bearer"})
    assert response.headers["content-type"] == "audio/mpeg"
    assert notices(response) == []
    assert median_pitch(as_samples(response.content), 24_000) > 130


class TestNotices:
    def test_fields_that_are_not_followed_are_reported(self, server):
        fields = {"format": "mp3", "emotion": "joy", "instructions": "whisper", "user": "me"}
        response = speak(server, **fields, ref_text="unused")
        kinds = ["emotion_ignored", "format_ignored", "instructions_ignored", "ref_text_ignored"]
        assert notices(response) == kinds
        assert notices(speak(server, **fields, stream=True)) == kinds[:3]

    @pytest.mark.parametrize("path", ["/generate", "/v1/inference/sesame/csm-1b", "/fal-ai/csm-1b"])
    def test_in_the_other_apis(self, server, path):
        scene = {"text": "one", "scene": [{"text": "one"}], "max_audio_length_ms": 240}
        kinds = notices(server.post(path, json=scene | {"pitch": 3}))
        assert "pitch_ignored" in kinds

    def test_names_are_limited_in_kind_and_number(self):
        kinds = [notice.kind for notice in ignored(["a\r\nb: c", "é", "x" * 99, "fine"])]
        assert kinds == ["field_ignored", "fine_ignored"]
        assert len(ignored(f"x{i}" for i in range(1000))) == 16


class TestRefusals:
    """One line that says what is wrong."""

    @pytest.mark.parametrize("text", ["\u200b\u2060", "\ufeff", "\u00ad \u200d", "\u2800"])
    def test_text_that_nobody_can_see(self, server, text):
        response = server.post(PATH, json=FIELDS | {"input": text})
        assert response.status_code == 400
        assert response.json()["detail"] == "the text is empty: there is nothing to say"

    @pytest.mark.parametrize("headers", [{}, {"Content-Type": ""}])
    def test_a_missing_content_type(self, server, headers):
        response = server.post(PATH, content=b'{"input": "one"}', headers=headers)
        assert response.status_code == 415
        assert "Content-Type" in response.json()["detail"]

    @pytest.mark.parametrize(
        ("path", "meant"),
        [
            ("/audio/speech", "/v1/audio/speech"),
            ("/v1/v1/audio/speech", "/v1/audio/speech"),
            ("/audio/voices", "/v1/audio/voices"),
            ("/openai/v1/chat/completions/", "/v1/chat/completions"),
        ],
    )
    def test_a_wrong_base_url_is_told(self, server, path, meant):
        response = server.post(path, json={})
        assert response.status_code == 404
        assert response.json()["detail"] == f"there is nothing at {path}; send it to {meant}"

    def test_other_paths_lead_to_the_list(self, server):
        response = server.post("/v1/audio/transcriptions", json={})
        assert response.json()["error"]["message"].endswith("; /docs lists what there is")
        assert server.get("/docs").status_code == 307  # to the page

    def test_another_method_is_told(self, server):
        response = server.get(PATH)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        assert response.json()["detail"] == "GET is not possible here; send POST"

    @pytest.mark.parametrize("voice", [["alloy"], {"name": "alloy"}])
    def test_a_field_of_another_type_is_called_by_its_name(self, server, voice):
        response = server.post(PATH, json=FIELDS | {"voice": voice})
        assert response.json()["error"]["param"] == "voice"


class TestReferences:
    """A voice in the request itself."""

    @pytest.mark.parametrize("head", ["", "data:audio/flac;base64,"])
    def test_a_recording_gives_the_voice(self, server, recording, transcript, head):
        """Of a man, where the first speaker is a woman by default."""
        audio = head + base64.b64encode(recording).decode()
        fields = {"ref_audio": audio, "ref_text": transcript, "input": "one two three four"}
        response = speak(server, **fields)
        assert median_pitch(as_samples(response.content), 24_000) < 130
        assert notices(response) == []
        as_turn = {"audio": audio, "audio_text": transcript, "text": "one two three four"}
        same = server.post("/generate", json=as_turn | {"seed": 4})
        assert same.content == response.content

    def test_a_named_voice_beside_it_is_reported(self, server, recording, transcript):
        audio = base64.b64encode(recording).decode()
        fields = {"ref_audio": audio, "ref_text": transcript, "max_audio_length_ms": 240}
        assert "voice_ignored" in notices(speak(server, voice="alloy", **fields))
        assert "voice_ignored" not in notices(speak(server, voice="1", **fields))

    def test_a_recording_without_transcript_is_reported(self, server, recording):
        audio = base64.b64encode(recording).decode()
        kinds = notices(speak(server, ref_audio=audio, max_audio_length_ms=240))
        assert "no_transcript" in kinds

    @pytest.mark.parametrize("audio", ["AAAA", "!", "data:audio/wav,AA"])
    def test_other_data_is_refused(self, server, audio):
        response = server.post(PATH, json=FIELDS | {"ref_audio": audio, "ref_text": "Hi."})
        assert response.status_code == 400
        assert response.json()["detail"].startswith("ref_audio")

    @pytest.mark.parametrize("url", ["https://a.example/a.wav", "file:///etc/passwd"])
    def test_addresses_are_not_fetched_by_default(self, server, url):
        response = server.post(PATH, json=FIELDS | {"ref_audio": url, "ref_text": "Hi."})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "fetching_off")


class TestLengths:
    """The standard library's `wave` reads the length from the head of a file."""

    @pytest.mark.parametrize("fields", [{}, {"stream": False}, {"stream_format": None}])
    def test_a_wav_file_has_its_length(self, server, fields):
        response = speak(server, **fields)
        assert int(response.headers["content-length"]) == len(response.content)
        with wave.open(io.BytesIO(response.content)) as file:
            assert file.getnframes() * 2 + 44 == len(response.content)
            assert len(file.readframes(file.getnframes())) == file.getnframes() * 2

    @pytest.mark.parametrize("path", [PATH, "/v1/inference/sesame/csm-1b"])
    def test_formats_are_accepted_in_any_case(self, server, path):
        fields = FIELDS | {"text": "one", "response_format": "FLAC", "max_audio_length_ms": 240}
        assert server.post(path, json=fields).status_code == 200

    @pytest.mark.parametrize("form", ["mp3", "flac", "opus", "pcm"])
    def test_stream_false_is_a_whole_file(self, server, form):
        response = speak(server, stream=False, response_format=form)
        assert "content-length" in response.headers
        assert "content-length" not in speak(server, response_format=form).headers

    @pytest.mark.parametrize("fields", [{"stream": True}, {"stream_format": "audio"}])
    def test_a_stream_has_none(self, server, fields):
        response = speak(server, **fields)
        assert "content-length" not in response.headers
        whole = speak(server).content
        assert len(response.content) == len(whole)
        one, two = (
            np.frombuffer(data[44:], "<i2").astype(int) for data in (response.content, whole)
        )
        assert np.abs(one - two).max() <= 1

    def test_stream_false_with_events_is_refused(self, server):
        response = server.post(PATH, json=FIELDS | {"stream": False, "stream_format": "sse"})
        assert response.status_code == 400
        assert "stream_format" in response.json()["detail"]


class TestLists:
    """The lists that Open WebUI asks for, without a key."""

    def test_voices_have_ids_and_names(self, server):
        voices = server.get("/v1/audio/voices").json()["voices"]
        assert {voice["id"]: voice["name"] for voice in voices} == {"rms": "rms", "slt": "slt"}
        assert all(voice["text"] for voice in voices)

    def test_models(self, server):
        [model] = server.get("/v1/audio/models").json()["models"]
        assert model["id"] == server.get("/v1/models").json()["data"][0]["id"]

    @pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/v1/audio/voices"])
    def test_head(self, server, path):
        response = httpx.head(server.url + path)
        assert (response.status_code, response.content) == (200, b"")


@pytest.fixture(scope="module")
def guarded(model):
    settings = Settings(**SMALL, api_keys=("first-key",), default_voice="SLT")
    with serve(model, settings) as running:
        yield running


class TestListsWithKeys:
    def test_shared_voices_are_listed_without_a_key(self, guarded, recording, transcript):
        key = {"Authorization": "Bearer first-key"}
        body = {"name": "mine", "text": transcript, "audio": base64.b64encode(recording).decode()}
        guarded.post("/v1/audio/voices", json=body, headers=key).raise_for_status()
        voices = guarded.get("/v1/audio/voices").json()["voices"]
        assert [(voice["id"], voice["text"]) for voice in voices] == [("rms", ""), ("slt", "")]
        own = guarded.get("/v1/audio/voices", headers=key).json()["voices"]
        assert [voice["id"] for voice in own] == ["mine", "rms", "slt"]
        assert guarded.get("/v1/audio/models").status_code == 200

    @pytest.mark.parametrize("headers", [{"Authorization": "Bearer x"}, {"X-API-Key": ""}])
    def test_a_wrong_key_is_refused(self, guarded, headers):
        assert guarded.get("/v1/audio/voices", headers=headers).status_code == 401

    def test_nothing_else_is_open(self, guarded):
        assert guarded.post("/v1/audio/voices", json={}).status_code == 401
        assert guarded.get("/v1/audio/voices/rms").status_code == 401
        assert guarded.get("/v1/models").status_code == 401

    def test_the_default_voice_of_the_server(self, guarded):
        key = {"Authorization": "Bearer first-key"}
        named, default = (
            guarded.post(PATH, json=FIELDS | {"voice": voice}, headers=key)
            for voice in ("slt", "default")
        )
        assert named.content == default.content
