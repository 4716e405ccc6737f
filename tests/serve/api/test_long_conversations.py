"""Conversations that outgrow a limit keep the turns that fix their voices, in all APIs."""

import base64
import dataclasses
import json

import pytest
from websockets.sync.client import connect

from csm_jax.inference.request_state import RequestState


@pytest.fixture
def submitted(server, monkeypatch):
    """The requests that reach the engine."""
    requests, submit = [], server.service.engine.submit

    def note(request, **options):
        requests.append(request)
        return submit(request, **options)

    monkeypatch.setattr(server.service.engine, "submit", note)
    return requests


@pytest.fixture
def three_turns(server, monkeypatch):
    """At most three turns are context."""
    settings = server.service.settings
    limits = dataclasses.replace(settings.limits, turns=3)
    changed = dataclasses.replace(settings, limits=limits)
    monkeypatch.setattr(server.service, "settings", changed)


def texts(request) -> list[str]:
    return [turn.text for turn in request.context]


def test_a_websocket_keeps_the_first_turn_of_each_speaker(server, submitted, recording, transcript):
    """Its window of 256 positions has room for about ten turns."""
    audio = base64.b64encode(recording).decode()
    lines = ["one two", "two three", "three four", "four five", "five six"] * 4
    with connect(server.url.replace("http", "ws") + "/v1/realtime") as socket:

        def ask(kind: str, last: str, **fields) -> dict:
            socket.send(json.dumps({"type": kind, **fields}))
            while True:
                message = socket.recv(timeout=60)
                if isinstance(message, str) and (got := json.loads(message))["type"] == last:
                    return got

        ask("turn", "turn", speaker=0, text=transcript, audio=audio)
        for number, line in enumerate(lines):
            ask("say", "done", speaker=number % 2, text=line, seed=1)
    last = submitted[-1]
    assert texts(last)[:2] == [transcript, "two three"]
    assert texts(last)[-3:] == lines[-4:-1]
    assert len(last.context) < len(lines)
    # The speaker's first turn, and the newest ones.
    service = server.service
    state = RequestState(service.model, last, lambda _: None, service.engine.max_seq_len)
    assert {1, len(last.context) - 1} <= set(state.kept_turns)


def test_a_chat_keeps_the_recording_of_a_speaker(
    server, submitted, three_turns, recording, transcript
):
    data = base64.b64encode(recording).decode()
    parts = [
        {"type": "text", "text": transcript},
        {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}},
    ]
    others = [{"role": "user", "content": each} for each in ("one", "two", "three", "four")]
    body = {"messages": [{"role": "user", "content": parts}, *others], "seed": 1}
    response = server.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert "context_dropped" in response.headers["X-Notices"]
    assert texts(submitted[-1])[-3:] == [transcript, "two", "three"]


def test_a_scene_keeps_the_first_recording_of_a_speaker(server, submitted, three_turns, recording):
    address = "data:audio/flac;base64," + base64.b64encode(recording).decode()
    context = [
        {"prompt": prompt, "audio_url": address, "speaker_id": 1} for prompt in ("nine", "eight")
    ]
    lines = [{"text": text, "speaker_id": 1} for text in ("one", "two", "three")]
    body = {"scene": lines, "context": context, "seed": 1}
    assert server.post("/fal-ai/csm-1b", json=body).status_code == 200
    assert [texts(request) for request in submitted[-3:]] == [
        ["nine", "eight"],
        ["nine", "eight", "one"],
        ["nine", "one", "two"],
    ]
