"""Voices by name: presets, added voices, and invalid names."""

import asyncio
import base64
import logging
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from hearing import median_pitch
from serving import PRESETS, SMALL, as_samples, serve

from csm_jax.errors import InputError
from csm_jax.inference import engine as engine_module
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.errors import QuotaError
from csm_jax.serve.settings import Limits, Settings
from csm_jax.serve.store import Store
from csm_jax.serve.voices.registry import Voices, check_name

PATH = "/v1/audio/voices"


def add(server, recording, transcript, name="mine", **fields):
    fields = {"name": name, "text": transcript} | fields
    return server.post(PATH, data=fields, files={"audio": ("a.flac", recording)})


def make_voices(model, limits=None, presets=(), data=None) -> Voices:
    limits = limits or Limits()
    return Voices(model, presets, Store(data, limits).voices, limits)


def names(server) -> list[str]:
    return [voice["name"] for voice in server.get(PATH).json()["voices"]]


def speak(server, voice):
    response = server.post("/generate", json={"text": "one two three", "voice": voice, "seed": 1})
    return as_samples(response.content)


def test_presets_are_listed_and_can_be_downloaded(server):
    voices = {voice["name"]: voice for voice in server.get(PATH).json()["voices"]}
    assert voices["slt"]["speaker"] == 0
    assert voices["rms"]["speaker"] == 1
    assert voices["rms"]["text"] == "six zero seven three"
    assert not voices["rms"]["deletable"]
    audio = as_samples(server.get(f"{PATH}/rms").content)
    assert len(audio) / 24_000 == pytest.approx(voices["rms"]["seconds"], abs=0.01)


@pytest.mark.parametrize("kind", ["form", "json"])
def test_a_voice_can_be_added_used_and_deleted(server, recording, transcript, kind):
    if kind == "form":
        response = add(server, recording, transcript, speaker=0)
    else:
        audio = base64.b64encode(recording).decode()
        body = {"name": "mine", "speaker": 0, "text": transcript, "audio": audio}
        response = server.post(PATH, json=body)
    assert response.status_code == 201, response.text
    assert response.json()["deletable"]
    assert "mine" in names(server)
    assert median_pitch(speak(server, "mine"), 24_000) < 130
    assert httpx.delete(f"{server.url}{PATH}/mine").status_code == 204
    assert "mine" not in names(server)
    assert httpx.delete(f"{server.url}{PATH}/mine").status_code == 404


def test_presets_cannot_be_replaced_or_deleted(server, recording, transcript):
    assert httpx.delete(f"{server.url}{PATH}/rms").status_code == 400
    assert add(server, recording, transcript, name="rms").status_code == 400
    assert "rms" in names(server)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/b", "/etc/passwd", "a\\b", "a..", "a" * 65, "a ", "a(1)", "-a"],
)
def test_names_with_paths_are_refused(server, recording, transcript, name):
    before = sorted(PRESETS[0].iterdir())
    assert add(server, recording, transcript, name=name).status_code == 400
    assert sorted(PRESETS[0].iterdir()) == before
    with pytest.raises(InputError):
        check_name(name)


@pytest.mark.parametrize(
    ("name", "stored"), [("Mary Jane", "Mary Jane"), ("anna.v2", "anna.v2"), ("zoe\u0308", "zoë")]
)
def test_names_of_people_are_names_of_voices(server, recording, transcript, name, stored):
    added = add(server, recording, transcript, name=name)
    assert (added.status_code, added.json()["id"]) == (201, stored)
    fields = {"input": "one", "voice": name.upper(), "max_audio_length_ms": 240}
    assert server.post("/v1/audio/speech", json=fields).status_code == 200
    assert httpx.delete(f"{server.url}{PATH}/{quote(stored)}").status_code == 204


@pytest.mark.parametrize("path", ["..%2f..%2fconfig.json", "%2e%2e", "rms.flac", "nobody"])
def test_unknown_voices_get_404(server, path):
    assert server.get(f"{PATH}/{path}").status_code in (400, 404)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"text": "a" * 200_000}, "characters"), ({"speaker": "x"}, "speaker")],
)
def test_errors_name_the_invalid_field(server, recording, transcript, fields, message):
    response = add(server, recording, transcript, **fields)
    assert response.status_code == 400
    assert message in response.json()["detail"]
    assert "mine" not in names(server)


@pytest.mark.parametrize("fields", [{}, {"text": ""}, {"text": " \n"}])
def test_a_voice_without_a_transcript_is_added_with_a_notice(server, recording, fields):
    """It is the voice of the recording, a man's."""
    data = {"name": "mine", **fields}
    added = server.post(PATH, data=data, files={"audio": ("a.flac", recording)})
    assert (added.status_code, added.headers["x-notices"]) == (201, "no_transcript")
    assert added.json()["text"] == ""
    body = {"input": "one two three four", "voice": "mine", "response_format": "wav", "seed": 1}
    response = server.post("/v1/audio/speech", json=body)
    assert response.headers["x-notices"] == "no_transcript"
    assert median_pitch(as_samples(response.content), 24_000) < 130
    assert httpx.delete(f"{server.url}{PATH}/mine").status_code == 204


def test_added_voices_outlive_the_process(model, tmp_path, recording, transcript):
    settings = Settings(**SMALL, data=tmp_path)
    with serve(model, settings) as first:
        add(first, recording, transcript, speaker=7)
    with serve(model, settings) as second:
        found = {voice["name"]: voice for voice in second.get(PATH).json()["voices"]}
        assert (found["mine"]["speaker"], found["mine"]["text"]) == (7, transcript)
        assert found["mine"]["deletable"]


def test_the_number_of_added_voices_is_limited(model, recording, transcript):
    voices = make_voices(model, Limits(voices_per_owner=1))
    audio = as_samples(recording)
    voices.add("", "a", 0, transcript, audio)
    voices.add("", "a", 1, transcript, audio)
    with pytest.raises(QuotaError, match="there are 1 voices already"):
        voices.add("", "b", 0, transcript, audio)
    assert voices.find("a", "").speaker == 1


def test_a_recording_without_a_transcript_is_a_voice(model, tmp_path, recording, caplog):
    Path(tmp_path / "a.flac").write_bytes(recording)
    with caplog.at_level(logging.WARNING):
        [voice] = make_voices(model, presets=[tmp_path]).visible_to("")
    assert "a.txt" in caplog.text
    assert voice.turn().text is None
    assert len(voice.codes) == round(voice.seconds * 12.5 + 0.5)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, 4800).astype(np.float32)


def test_a_voice_sounds_the_same_after_a_restart(model, tmp_path, noise):
    """Its codes are those of the stored recording, not of the uploaded one."""
    store = Store(tmp_path, Limits())
    before = Voices(model, [], store.voices, Limits()).add("anna", "a", 3, "hello", noise)
    store.close()
    after = make_voices(model, data=tmp_path).find("a", "anna")
    np.testing.assert_array_equal(before.codes, after.codes)
    assert (after.speaker, after.text, after.seconds) == (3, "hello", 0.2)


REPLACE = """
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from csm_jax.serve.settings import Limits
from csm_jax.serve.store import Store
from csm_jax.serve.store.voices import VoiceRow

store = Store(Path(sys.argv[1]), Limits())
print("open", flush=True)
number = 0
while True:
    number += 1
    digit = str(number % 10)
    store.voices.put(VoiceRow("anna", "a", number % 10, digit * 1000, digit.encode() * 200_000))
"""


@pytest.mark.parametrize("seconds", [0.05, 0.11, 0.23])
def test_replacing_a_voice_is_atomic(tmp_path, seconds):
    """At whatever time the process is killed."""
    command = [sys.executable, "-c", REPLACE, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    store = Store(tmp_path, Limits())
    voice = store.voices.find("anna", "a")
    store.close()
    assert voice is not None
    assert {*voice.text, *voice.recording.decode()} == {str(voice.speaker)}


def test_presets_can_be_in_a_read_only_directory(model, tmp_path, recording, transcript):
    (tmp_path / "a.flac").write_bytes(recording)
    (tmp_path / "a.txt").write_text(transcript)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())}
    voices = make_voices(model, presets=[tmp_path])
    voices.add("anna", "b", 0, transcript, as_samples(recording))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.iterdir())}


def test_a_later_preset_does_not_replace_an_owners_voice(
    model, tmp_path, noise, recording, transcript
):
    store = Store(None, Limits())
    Voices(model, [], store.voices, Limits()).add("anna", "a", 3, "hello", noise)
    (tmp_path / "a.flac").write_bytes(recording)
    (tmp_path / "a.txt").write_text(transcript)
    voices = Voices(model, [tmp_path], store.voices, Limits())
    assert voices.find("a", "anna").text == "hello"
    assert voices.find("a", "ben").text == transcript
    assert [voice.text for voice in voices.visible_to("anna")] == ["hello"]
    voices.delete("anna", "a")
    assert voices.find("a", "anna").text == transcript


def test_adding_a_voice_does_not_change_the_meaning_of_api_names(model, noise):
    voices = make_voices(model, presets=PRESETS)
    before = voices.find_api_voice("alloy", "anna", ["alloy"]).name
    voices.add("anna", "aaa", 0, "hello", noise)
    assert voices.find_api_voice("alloy", "anna", ["alloy"]).name == before


def test_a_transcript_has_the_limits_of_a_request(model, noise):
    voices = make_voices(model, Limits(text_characters=100))
    with pytest.raises(InputError, match="transcript"):
        voices.add("anna", "a", 0, "a" * 101, noise)
    assert voices.visible_to("anna") == []


def test_deleting_a_voice_does_not_affect_running_requests(server, recording, transcript):
    """But its recording cannot be downloaded any more."""
    add(server, recording, transcript)
    voice = server.service.voices.find("mine", "")
    assert httpx.delete(f"{server.url}{PATH}/mine").status_code == 204
    assert len(voice.turn().codes)
    with pytest.raises(InputError, match="deleted"):
        server.service.voices.recording(voice)


def test_reading_voices_does_not_wait_for_the_disk(model, noise, monkeypatch):
    """While a voice is being stored, other voices are found, and unknown ones are refused."""
    voices = make_voices(model, presets=PRESETS)
    writing, written = threading.Event(), threading.Event()

    def put(row) -> None:
        writing.set()
        assert written.wait(20)

    monkeypatch.setattr(voices._store, "put", put)
    with ThreadPoolExecutor(2) as threads:
        adding = threads.submit(voices.add, "", "mine", 0, "one", noise)
        assert writing.wait(20)
        try:
            reading = threads.submit(lambda: (voices.visible_to(""), voices.all()))
            before, _ = reading.result(5)
            assert "mine" not in [voice.name for voice in before]
            with pytest.raises(InputError, match="no voice"):
                threads.submit(voices.find, "mine", "").result(5)
        finally:
            written.set()
        adding.result(20)
    assert voices.has("mine", "")


@pytest.fixture
def warm_server(model):
    """A server with everything compiled, so that a test sees only its own compilations."""
    with serve(model, Settings(**SMALL), warm=True) as running:
        yield running


@pytest.mark.long
def test_a_voice_of_a_known_length_compiles_nothing(
    warm_server, recording, transcript, monkeypatch
):
    assert add(warm_server, recording, transcript).status_code == 201
    compiled = []
    monkeypatch.setattr(engine_module, "compile_all", lambda *_: compiled.append(1))
    assert add(warm_server, recording, transcript, name="again").status_code == 201
    assert not compiled
    for name in ("mine", "again"):
        assert httpx.delete(f"{warm_server.url}{PATH}/{name}").status_code == 204


def test_adding_a_voice_does_not_wait_for_the_warm_up(server, recording, transcript, monkeypatch):
    """It can be used at once; its programs are compiled on demand."""
    warm = threading.Event()
    monkeypatch.setattr(server.service, "not_ready", "warming up")
    monkeypatch.setattr(server.service.engine, "warm_up", lambda *_: warm.wait(60))
    try:
        response = add(server, recording, transcript)
        assert response.status_code == 201
        assert not warm.is_set()
    finally:
        warm.set()
    assert httpx.delete(f"{server.url}{PATH}/mine").status_code == 204


def test_one_caller_cannot_use_all_threads_for_downloads(server):
    """Downloads run when it is the caller's turn."""
    service, gate = server.service, threading.Event()
    loop = service.warmed.get_loop()
    flood = [
        asyncio.run_coroutine_threadsafe(
            service.threads.work(Caller(share="flood"), gate.wait, 60), loop
        )
        for _ in range(50)
    ]
    try:
        assert server.get(f"{PATH}/rms").status_code == 200
        assert server.post("/generate", json={"text": "one", "seed": 1}).status_code == 200
    finally:
        gate.set()
    for each in flood:
        each.result(20)
