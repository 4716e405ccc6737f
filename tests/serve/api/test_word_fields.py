"""Words with their times in responses: those of the library for the same request."""

import base64
import dataclasses
import json
from collections.abc import Sequence

import httpx
import pytest
from serving import SMALL, as_samples, serve
from talking import Talk
from websockets.sync.client import connect

from csm_jax import Request, Word
from csm_jax.serve.settings import Settings

TEXT = "One two, three four!"
SPEECH = {"input": TEXT, "voice": "slt", "seed": 4, "stream_format": "sse"}


@pytest.fixture(scope="module")
def unaligned(model):
    """A server whose checkpoint has no alignment heads."""
    with serve(dataclasses.replace(model, alignment=None), Settings(**SMALL)) as running:
        yield running


def events_of(response: httpx.Response) -> list[dict]:
    lines = response.raise_for_status().text.strip().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def check_equal(rows: Sequence[dict], words: Sequence[Word], speed: float = 1.0) -> None:
    assert [row["text"] for row in rows] == [word.text for word in words]
    for row, word in zip(rows, words, strict=True):
        assert set(row) == {"text", "start", "end", "confidence"}
        times = word.start / speed, word.end / speed, word.confidence
        assert (row["start"], row["end"], row["confidence"]) == pytest.approx(times, abs=2e-3)


@pytest.fixture(scope="module")
def request_in_slt(server) -> Request:
    voice = server.service.voices.find("slt", "")
    return Request(TEXT, voice.speaker, [voice.turn()], seed=4)


@pytest.mark.parametrize("form", ["wav", "mp3"])
def test_the_words_of_deepinfra_are_those_of_the_library(server, form):
    fields = {"text": TEXT, "seed": 3, "temperature": 0.7, "response_format": form}
    response = server.post("/v1/inference/sesame/csm-1b", json=fields).raise_for_status().json()
    speech = server.service.model.speak(
        TEXT,
        sampling=dataclasses.replace(server.service.settings.sampling, temperature=0.7),
        seed=3,
    )
    check_equal(response["words"], speech.words)
    assert [row["text"] for row in response["words"]] == TEXT.split()
    data = base64.b64decode(response["audio"].partition(",")[2])
    assert response["words"][-1]["end"] <= len(as_samples(data)) / 24_000 + 0.05


@pytest.mark.parametrize("speed", [1.0, 1.5])
def test_events_have_the_words_of_the_library(server, request_in_slt, speed):
    expected: list[Word] = []
    server.service.model.generate(request_in_slt, on_word=expected.append)
    fields = SPEECH | {"words": True, "response_format": "pcm", "speed": speed}
    events = events_of(server.post("/v1/audio/speech", json=fields))
    check_equal([row for event in events for row in event.get("words", [])], expected, speed)
    assert [event["type"] for event in events[:-1]] == ["speech.audio.delta"] * (len(events) - 1)
    assert events[-1]["type"] == "speech.audio.done"


def test_words_come_while_they_are_spoken(server, request_in_slt):
    """Each when at most a second of speech has been sent after it."""
    events = events_of(
        server.post("/v1/audio/speech", json=SPEECH | {"words": True, "response_format": "pcm"})
    )
    seconds, num_words = 0.0, 0
    for event in events:
        seconds += len(base64.b64decode(event.get("audio", ""))) / 48_000
        for row in event.get("words", []):
            assert seconds - row["end"] < 1
            num_words += 1
    assert num_words == len(TEXT.split())


def test_events_have_words_only_if_they_are_asked_for(server):
    response = server.post("/v1/audio/speech", json=SPEECH)
    assert not any("words" in event for event in events_of(response))
    assert "x-notices" not in response.headers


def test_words_without_events_are_ignored_with_a_notice(server):
    fields = SPEECH | {"words": True, "stream_format": "audio"}
    response = server.post("/v1/audio/speech", json=fields).raise_for_status()
    assert response.headers["x-notices"] == "words_ignored"


def test_without_alignment_heads_there_are_no_words(unaligned):
    fields = {"text": TEXT, "seed": 3}
    path = "/v1/inference/sesame/csm-1b"
    assert unaligned.post(path, json=fields).raise_for_status().json()["words"] == []
    response = unaligned.post("/v1/audio/speech", json=SPEECH | {"words": True})
    assert response.headers["x-notices"] == "no_words"
    assert not any("words" in event for event in events_of(response))


def test_a_conversation_without_alignment_heads_keeps_the_text_and_the_codes_that_were_heard(
    unaligned,
):
    with connect(unaligned.url.replace("http", "ws") + "/v1/realtime") as socket:
        talk = Talk(socket)
        talk.send("say", text=TEXT, seed=3, words=True)
        _, _, done = talk.listen()
        assert done["notices"] == "no_words"
        assert talk.ask("cancel", audio_end_ms=400)["text"] == TEXT
        assert talk.ask("cancel", audio_end_ms=40)["text"] == ""
        assert talk.ask("turn", speaker=1, text="nine")["turns"] == 1
