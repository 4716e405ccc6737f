"""A conversation over a WebSocket, by an independent client (`websockets`)."""

import asyncio
import base64
import contextlib
import json
import time
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from fastapi import WebSocketDisconnect
from hearing import median_pitch
from serving import SMALL, serve
from talking import Talk
from websockets.sync.client import connect

from csm_jax.prompt.turns import Segment
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.admission.rate_limits import RateLimits
from csm_jax.serve.api.realtime import MAX_WAITING_CHARACTERS, RealtimeSession
from csm_jax.serve.api.websocket import message_budget, serve_messages
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits, Settings


# Three of 300 seeds give another voice than that of the context, so tests of voices have seeds.
@pytest.fixture
def talk(server):
    with connect(server.url.replace("http", "ws") + "/v1/realtime") as socket:
        yield Talk(socket)


def test_text_in_speech_out(talk, server):
    """The speech of the library for the same request."""
    talk.ask("session", voice="slt", seed=3)
    talk.send("text", text="one two three")
    talk.send("flush")
    started, audio, done = talk.listen()
    assert started["text"] == "one two three"
    assert not done["cancelled"]
    turn = server.service.voices.find("slt", "").turn()
    expected = server.service.model.generate("one two three", 0, [turn], seed=3)
    np.testing.assert_allclose(audio, np.clip(expected, -1, 1), atol=1e-3)


def test_text_is_spoken_sentence_by_sentence(talk):
    """A sentence is spoken as soon as the next one begins."""
    for word in ["one", " two", " thr", "ee", ". ", "fo", "ur", " five.", " six"]:
        talk.send("text", text=word)
    assert talk.listen()[0]["text"] == "one two three."
    assert talk.listen()[0]["text"] == "four five."
    talk.send("flush")
    assert talk.listen()[0]["text"] == "six"


@pytest.mark.parametrize("has_text", [True, False])
def test_earlier_turns_are_context(talk, recording, transcript, has_text):
    """A turn in another voice with the same speaker number sets the voice."""
    audio = base64.b64encode(recording).decode()
    talk.ask("session", seed=1)
    added = talk.ask("turn", speaker=0, text=transcript if has_text else None, audio=audio)
    assert added == {"type": "turn", "turns": 1}
    talk.send("say", text="one two three four")
    _, speech, done = talk.listen()
    assert median_pitch(speech, 24_000) < 130
    assert done["notices"] == ("" if has_text else "no_transcript")
    assert talk.ask("turn", speaker=1, text="nine")["turns"] == 3


def test_whole_turns_of_two_speakers(talk, server):
    """Sent at once, each with its own voice and seed, they are what the library says to the same
    context, with all sentences of a turn in one."""
    first, second = ("One two. Three four.", 0, "slt", 3), ("five six", 1, "rms", 4)
    lines = [first, second, ("seven", 0, None, 5)]
    for text, speaker, voice, seed in lines:
        talk.send("say", text=text, speaker=speaker, voice=voice, seed=seed)
    model, context = server.service.model, []
    for number, (text, speaker, voice, seed) in enumerate(lines, 1):
        started, audio, _ = talk.listen()
        assert (started["id"], started["text"]) == (number, text)
        turns = [server.service.voices.find(voice, "").turn(speaker)] if voice else []
        codes = model.generate_codes(text, speaker, turns + context, seed=seed)
        expected = np.clip(model.codec.decode(codes), -1, 1)
        np.testing.assert_allclose(audio, expected, atol=1e-3)
        context.append(Segment(speaker, text, codes=codes))


def test_a_say_has_its_own_settings(talk):
    """Settings that arrive while it waits apply to later utterances."""
    talk.ask("session", voice="slt", seed=1)
    talk.send("say", text="one two three four", temperature=0.5)
    talk.send("session", voice="rms", speaker=0)
    talk.send("say", text="five")
    messages = []
    while len([each for each in messages if each.get("type") == "done"]) < 2:
        if not isinstance(message := talk.receive(), bytes):
            messages.append(message)
    assert [message["id"] for message in messages if message["type"] == "done"] == [1, 2]
    session = next(message for message in messages if message["type"] == "session")
    assert session["voice"] == "rms"
    # The settings held for that turn only.
    assert "temperature" not in session
    assert talk.ask("session", voice=None)["voice"] is None


def test_errors_have_the_id_of_the_utterance(talk):
    talk.send("say", text="one", voice="nobody")
    talk.send("say", text="a" * 10_001)
    talk.send("say", text="two")
    errors = [talk.receive(), talk.receive()]
    assert {error["id"]: error["type"] for error in errors} == {1: "error", 2: "error"}
    assert "no voice" in errors[0]["message"]
    assert "10001 characters" in errors[1]["message"]
    assert errors[1]["param"] == "text"
    assert talk.listen()[0]["id"] == 3


def test_cancel_stops_the_speech_and_keeps_the_words_that_were_sent(talk, server):
    """Speech stops within a frame, waiting text is dropped, and words that were sent stay."""
    talk.ask("session", temperature=5)
    for _ in range(3):
        talk.send("text", text="one two three four five six seven eight nine. ")
    talk.send("flush")
    assert talk.receive()["type"] == "started"
    assert isinstance(talk.receive(), bytes)
    asked = time.monotonic()
    talk.send("cancel")
    while isinstance(message := talk.receive(), bytes):
        pass
    assert message["type"] == "done"
    assert message["cancelled"]
    num_kept = int(message["text"] != "")
    assert talk.receive() == {"type": "cancelled"}
    assert time.monotonic() - asked < 10
    server.wait_until_idle(seconds=10)
    # Waiting sentences are not sent, and the conversation continues.
    assert talk.ask("turn", speaker=1, text="nine")["turns"] == num_kept + 1


def test_cancel_without_speech_is_acknowledged(talk):
    assert talk.ask("cancel") == {"type": "cancelled"}


def test_cancel_before_the_first_chunk_sends_nothing(talk):
    """Even if both messages arrive at once."""
    for _ in range(20):
        talk.send("text", text="one two three")
        talk.send("flush")
        talk.send("cancel")
        while (message := talk.receive()) != {"type": "cancelled"}:
            assert isinstance(message, bytes) or message["type"] in ("started", "done")


def test_the_voice_can_change(talk):
    assert talk.ask("session", voice="rms", seed=1)["speaker"] == 1
    talk.send("text", text="one two three four")
    talk.send("flush")
    assert median_pitch(talk.listen()[1], 24_000) < 130


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("{", "JSON"),
        ('{"type": "dance"}', "dance"),
        ('{"text": "a"}', "type"),
        ('{"type": "session", "temperature": "hot"}', "temperature"),
        ('{"type": "session", "voice": "nobody"}', "no voice"),
        ('{"type": "turn", "speaker": 0, "text": "a", "audio": "?"}', "base64"),
        ('{"type": "turn", "speaker": 0, "text": ""}', "text"),
        ('{"type": "turn", "speaker": 0, "text": " "}', "nothing to say"),
        ('{"type": "turn", "speaker": 0, "text": "\\u200b\\u2060"}', "nothing to say"),
        ('{"type": "say", "text": " \\u200b"}', "nothing to say"),
        ('{"type": "say", "text": ""}', "text"),
        (json.dumps({"type": "text", "text": "a" * 20_000}), "20000 characters"),
    ],
)
def test_the_conversation_continues_after_an_error(talk, message, reason):
    talk.socket.send(message)
    error = talk.receive()
    assert error["type"] == "error"
    assert reason in error["message"]
    assert talk.ask("session", speaker=3)["speaker"] == 3


def test_a_disconnect_frees_the_slot(talk, server):
    talk.ask("session", temperature=5)
    talk.send("text", text="one two three four five six seven eight nine")
    talk.send("flush")
    talk.receive()
    talk.receive()
    talk.socket.close()
    server.wait_until_idle(seconds=2)


def test_binary_messages_are_refused(talk):
    """The connection may be closed, but the server continues."""
    talk.socket.send(b"\x00\x01")
    assert talk.receive()["type"] == "error"


class Gone:
    """A WebSocket whose client has disconnected."""

    scope: ClassVar[dict] = {"type": "websocket"}

    async def send_json(self, message: dict) -> None:
        raise WebSocketDisconnect


def test_a_cancel_of_a_disconnected_client_returns():
    """Otherwise the session would never end."""

    async def scenario() -> None:
        async with RealtimeSession(a_service(), Gone()) as session:
            session._say("x")  # its messages cannot be sent either
            await asyncio.wait_for(session.handle(b'{"type": "cancel"}'), 5)

    asyncio.run(scenario())


def test_a_refused_turn_is_not_added(talk):
    """Otherwise it would make all later utterances fail."""
    talk.ask("session", seed=1)
    for text in (" ", "\u200b"):
        assert talk.ask("turn", speaker=1, text=text)["type"] == "error"
    talk.send("text", text="\u200b")
    assert talk.ask("flush")["type"] == "error"
    talk.send("text", text="one")
    talk.send("flush")
    assert talk.listen()[0]["text"] == "one"


class Silent:
    """A handler that generates nothing."""

    is_idle = True

    def __init__(self):
        self.handled = []

    async def handle(self, message: bytes) -> None:
        self.handled.append(message)
        await asyncio.sleep(3600 if message == b"slow" else 0)

    async def wait_until_ended(self) -> None:
        await asyncio.sleep(3600)


class Client:
    """A WebSocket whose client sends these messages, and then waits."""

    def __init__(self, *messages: str | None):
        self.messages = list(messages)

    async def receive(self) -> dict:
        await asyncio.sleep(0)
        if not self.messages:
            await asyncio.sleep(3600)
        text = self.messages.pop(0)
        kind = "websocket.disconnect" if text is None else "websocket.receive"
        return {"type": kind, "text": text}


def test_a_disconnect_cancels_the_current_message():
    handler = Silent()
    leaving = serve_messages(Client("a", "slow", "b", None), handler, Limits())
    asyncio.run(asyncio.wait_for(leaving, 5))
    assert handler.handled in ([b"a"], [b"a", b"slow"])


def test_an_idle_socket_ends_with_an_error():
    with pytest.raises(ApiError, match=r"no message for 0\.1 s"):
        asyncio.run(serve_messages(Client("a"), Silent(), Limits(socket_idle_seconds=0.1)))


def test_a_socket_is_not_idle_while_speech_is_sent():
    async def scenario() -> None:
        handler = Silent()
        handler.is_idle = False
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(
                serve_messages(Client(), handler, Limits(socket_idle_seconds=0.05)), 1
            )

    asyncio.run(scenario())


def test_waiting_messages_are_limited():
    limits = Limits(body_bytes=20_000)
    with pytest.raises(ApiError, match="too many messages"):
        asyncio.run(serve_messages(Client("slow", *["a"] * 100), Silent(), limits))


def test_messages_of_all_websockets_of_a_caller_are_limited_together():
    """Including the current message; messages of disconnected clients are released."""
    limits = Limits(body_bytes=20_000, pending_body_bytes=100_000)
    budget = message_budget(limits)

    async def scenario() -> None:
        def sending(text: str, share: str) -> asyncio.Task:
            client = Client("slow", text)
            return asyncio.create_task(serve_messages(client, Silent(), limits, budget, share))

        waiting = [sending("a" * 10_000, "one") for _ in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError, match="too many of your messages"):
            await sending("a" * 10_000, "one")
        others = sending("a" * 10_000, "other")
        await asyncio.sleep(0.05)
        assert not others.done()
        for task in (*waiting, others):
            task.cancel()
        await asyncio.gather(*waiting, others, return_exceptions=True)
        budget.check("one", 50_000)

    asyncio.run(scenario())


def test_messages_are_counted_in_bytes():
    limits = Limits(body_bytes=20_000)
    with pytest.raises(ApiError, match="too many messages"):
        asyncio.run(serve_messages(Client("\U0001f600" * 6_000), Silent(), limits))


class Quiet(Gone):
    """A WebSocket that records the messages to the client."""

    def __init__(self):
        self.sent = []

    async def send_json(self, message: dict) -> None:
        self.sent.append(message)

    async def send_bytes(self, data: bytes) -> None:
        self.sent.append(data)


def a_service(**more) -> SimpleNamespace:
    parts = dict(settings=Settings(), rate_limits=RateLimits(0, 0), voices=None, engine=None)
    return SimpleNamespace(**(parts | more))


def as_bytes(kind: str, **fields) -> bytes:
    return json.dumps({"type": kind, **fields}).encode()


def test_a_text_that_is_too_long_is_refused_before_it_is_split():
    async def scenario() -> None:
        session = RealtimeSession(a_service(), Quiet())
        for message in ("text", "say"):
            started = time.process_time()
            await session.handle(as_bytes(message, text="a. " * 1_000_000))
            assert time.process_time() - started < 2
        assert [each["code"] for each in session._socket.sent] == ["too_long"] * 2
        assert session._waiting.empty()

    asyncio.run(scenario())


def test_the_characters_of_waiting_utterances_are_limited():
    async def scenario() -> None:
        session = RealtimeSession(a_service(), Quiet())
        for _ in range(50):
            await session.handle(as_bytes("say", text="a" * 10_000))
        assert session._waiting.qsize() == MAX_WAITING_CHARACTERS // 10_000
        assert {each["code"] for each in session._socket.sent} == {"queue_full"}

    asyncio.run(scenario())


def test_text_without_the_end_of_a_sentence_is_limited():
    async def scenario() -> None:
        session = RealtimeSession(a_service(), Quiet())
        for _ in range(3):
            await session.handle(as_bytes("text", text="a" * 4000))
        (error,) = session._socket.sent
        assert "characters without an end" in error["message"]
        assert not len(session._unfinished)

    asyncio.run(scenario())


def test_a_cancel_during_the_submission_cancels_the_request():
    """No speech is sent, and its request is cancelled."""

    async def scenario() -> None:
        class Spoken:
            num_cancels = 0

            def cancel(self) -> None:
                self.num_cancels += 1

        submitting, submitted, speech = asyncio.Event(), asyncio.Event(), Spoken()

        async def speak(*_, **__) -> Spoken:
            submitting.set()
            await submitted.wait()
            return speech

        async def admit(caller: Caller):
            return contextlib.nullcontext()

        socket = Quiet()
        service = a_service(speak=speak, admit=admit)
        async with RealtimeSession(service, socket) as session:
            await session.handle(as_bytes("say", text="one"))
            await asyncio.wait_for(submitting.wait(), 5)
            cancelling = asyncio.create_task(session.handle(as_bytes("cancel")))
            await asyncio.sleep(0)
            submitted.set()
            await asyncio.wait_for(cancelling, 5)
        assert socket.sent == [{"type": "cancelled"}]
        assert speech.num_cancels

    asyncio.run(scenario())


def test_turns_beyond_the_window_are_dropped(model):
    """Frames and text take positions of the window."""

    async def work(caller: Caller, function, *arguments):
        return function(*arguments)

    engine = SimpleNamespace(max_seq_len=100)
    session = RealtimeSession(
        a_service(engine=engine, model=model, threads=SimpleNamespace(work=work)), Gone()
    )

    def remember(speaker: int, text: str, num_frames: int) -> list[int]:
        codes = np.zeros((num_frames, model.config.num_codebooks), np.int32)
        asyncio.run(session._history.add(Segment(speaker, text, codes=codes)))
        return [turn.speaker for turn in session._history.turns]

    for number in range(10):
        kept = remember(number, "a", 40)
    assert kept == [8, 9]
    assert remember(10, "one two three " * 20, 1) == [10]
    assert remember(11, "a", 400) == [11]


def test_a_client_that_does_not_read_counts_as_disconnected():
    """Sending a message has the time limit `write_seconds`."""

    class NotReading(Gone):
        async def send_json(self, message: dict) -> None:
            await asyncio.sleep(3600)

    async def scenario() -> None:
        settings = Settings(limits=Limits(write_seconds=0.1))
        async with RealtimeSession(
            SimpleNamespace(settings=settings, engine=None), NotReading()
        ) as session:
            with pytest.raises(WebSocketDisconnect):
                await asyncio.wait_for(session.handle(b"{"), 5)

    asyncio.run(scenario())


def test_websockets_of_one_caller_are_limited(model):
    settings = Settings(**SMALL, limits=Limits(sockets_per_caller=2))
    with serve(model, settings, warm=None) as running:
        url = running.url.replace("http", "ws") + "/v1/realtime"
        with connect(url) as first, connect(url) as second:
            assert Talk(first).ask("session")["type"] == "session"
            assert Talk(second).ask("session")["type"] == "session"
            with connect(url) as third:
                refused = Talk(third).receive()
                assert (refused["type"], refused["code"]) == ("error", "too_many_sockets")
        with connect(url) as again:
            assert Talk(again).ask("session")["type"] == "session"
