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
from websockets.sync.client import connect

from csm_jax.prompt import Segment
from csm_jax.serve.admission.caller import Caller
from csm_jax.serve.admission.rate_limits import Quotas
from csm_jax.serve.api.realtime import MAX_WAITING_CHARACTERS, Conversation
from csm_jax.serve.api.websocket import converse, held_messages
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Limits, Settings


@pytest.fixture
def talk(server):
    with connect(server.url.replace("http", "ws") + "/v1/realtime") as socket:
        yield Talk(socket)


# Of 300 seeds three say it in another voice than that of the context: tests of voices have seeds.
class Talk:
    """One conversation; keeps what was heard."""

    def __init__(self, socket):
        self.socket = socket

    def send(self, kind: str, **fields) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def receive(self):
        message = self.socket.recv(timeout=60)
        return message if isinstance(message, bytes) else json.loads(message)

    def ask(self, kind: str, **fields) -> dict:
        self.send(kind, **fields)
        return self.receive()

    def listen(self) -> tuple[dict, np.ndarray, dict]:
        """One sentence: what was said when it began, its samples, what was said when it ended."""
        started, pieces = self.receive(), []
        assert started["type"] == "started", started
        while isinstance(message := self.receive(), bytes):
            pieces.append(message)
        assert message["type"] == "done"
        audio = np.frombuffer(b"".join(pieces), "<i2").astype(np.float32) / 32768
        assert message["seconds"] == pytest.approx(len(audio) / 24_000, abs=1e-3)
        return started, audio, message


def test_text_in_speech_out(talk, server):
    """What the library says to the same request."""
    talk.ask("session", voice="slt", seed=3)
    talk.send("text", text="one two three")
    talk.send("flush")
    started, audio, done = talk.listen()
    assert started["text"] == "one two three"
    assert not done["cancelled"]
    turn = server.service.voices.find("slt", "").turn()
    expected = server.service.model.generate("one two three", 0, [turn], seed=3)
    np.testing.assert_allclose(audio, np.clip(expected, -1, 1), atol=1e-3)


def test_words_as_a_language_model_writes_them(talk):
    """A sentence is said as soon as the next one begins."""
    for word in ["one", " two", " thr", "ee", ". ", "fo", "ur", " five.", " six"]:
        talk.send("text", text=word)
    assert talk.listen()[0]["text"] == "one two three."
    assert talk.listen()[0]["text"] == "four five."
    talk.send("flush")
    assert talk.listen()[0]["text"] == "six"


def test_the_turns_are_kept(talk, recording, transcript):
    """What the user said in another's voice under the same number is gone on with."""
    audio = base64.b64encode(recording).decode()
    talk.ask("session", seed=1)
    heard = talk.ask("turn", speaker=0, text=transcript, audio=audio)
    assert heard == {"type": "turn", "turns": 1}
    talk.send("text", text="one two three four")
    talk.send("flush")
    assert median_pitch(talk.listen()[1], 24_000) < 130
    assert talk.ask("turn", speaker=1, text="nine")["turns"] == 3


def test_whole_turns_of_two_speakers(talk, server):
    """Sent at once, each with its own voice and seed, they are what the library says to the same
    context, with all sentences of a turn in one."""
    first, second = ("One two. Three four.", 0, "slt", 3), ("five six", 1, "rms", 4)
    lines = [first, second, ("seven", 0, None, 5)]
    for text, speaker, voice, seed in lines:
        talk.send("say", text=text, speaker=speaker, voice=voice, seed=seed)
    model, heard = server.service.model, []
    for number, (text, speaker, voice, seed) in enumerate(lines, 1):
        started, audio, _ = talk.listen()
        assert (started["id"], started["text"]) == (number, text)
        turns = [server.service.voices.find(voice, "").turn(speaker)] if voice else []
        codes = model.generate_codes(text, speaker, turns + heard, seed=seed)
        expected = np.clip(model.codec.decode(codes), -1, 1)
        np.testing.assert_allclose(audio, expected, atol=1e-3)
        heard.append(Segment(speaker, text, codes=codes))


def test_a_turn_is_spoken_as_it_was_asked_for(talk):
    """Settings that come while it waits are for what comes after it."""
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
    # Of that turn alone.
    assert "temperature" not in session
    assert talk.ask("session", voice=None)["voice"] is None


def test_errors_name_the_turn(talk):
    talk.send("say", text="one", voice="nobody")
    talk.send("say", text="a" * 10_001)
    talk.send("say", text="two")
    errors = [talk.receive(), talk.receive()]
    assert {error["id"]: error["type"] for error in errors} == {1: "error", 2: "error"}
    assert "no voice" in errors[0]["message"]
    assert "10001 characters" in errors[1]["message"]
    assert errors[1]["param"] == "text"
    assert talk.listen()[0]["id"] == 3


def test_barge_in(talk, server):
    """Speech stops within a frame; what was not said is forgotten; what was is remembered."""
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
    assert talk.receive() == {"type": "cancelled"}
    assert time.monotonic() - asked < 1
    server.wait_until_idle(seconds=1)
    # Nothing of the other sentences comes, and the conversation goes on.
    assert talk.ask("turn", speaker=1, text="nine")["turns"] == 2


def test_cancel_when_nothing_is_said(talk):
    assert talk.ask("cancel") == {"type": "cancelled"}


def test_cancel_before_anything_is_heard(talk):
    """However close together the two come."""
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
    ("message", "said"),
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
def test_what_is_wrong_is_said_and_the_conversation_goes_on(talk, message, said):
    talk.socket.send(message)
    error = talk.receive()
    assert error["type"] == "error"
    assert said in error["message"]
    assert talk.ask("session", speaker=3)["speaker"] == 3


def test_a_client_that_leaves_frees_its_row(talk, server):
    talk.ask("session", temperature=5)
    talk.send("text", text="one two three four five six seven eight nine")
    talk.send("flush")
    talk.receive()
    talk.receive()
    talk.socket.close()
    server.wait_until_idle(seconds=2)


def test_bytes_are_no_message(talk):
    """The connection may end, but nothing else."""
    talk.socket.send(b"\x00\x01")
    assert talk.receive()["type"] == "error"


class Gone:
    """A socket whose client has hung up."""

    scope: ClassVar[dict] = {"type": "websocket"}

    async def send_json(self, message: dict) -> None:
        raise WebSocketDisconnect


def test_a_cancel_of_a_disconnected_client_waits_for_nothing():
    """Or the conversation would never end."""

    async def scenario() -> None:
        service = SimpleNamespace(settings=Settings(), quotas=Quotas(0, 0))
        async with Conversation(service, Gone()) as conversation:
            conversation._say("x")  # cannot be told either
            await asyncio.wait_for(conversation.take(b'{"type": "cancel"}'), 5)

    asyncio.run(scenario())


def test_a_blank_turn_is_forgotten(talk):
    """Or every sentence after it would be refused for it."""
    talk.ask("session", seed=1)
    for text in (" ", "\u200b"):
        assert talk.ask("turn", speaker=1, text=text)["type"] == "error"
    talk.send("text", text="\u200b")
    assert talk.ask("flush")["type"] == "error"
    talk.send("text", text="one")
    talk.send("flush")
    assert talk.listen()[0]["text"] == "one"


class Silent:
    """A conversation in which nothing is said."""

    is_silent = True

    def __init__(self):
        self.taken = []

    async def take(self, message: bytes) -> None:
        self.taken.append(message)
        await asyncio.sleep(3600 if message == b"slow" else 0)

    async def ended(self) -> None:
        await asyncio.sleep(3600)


class Client:
    """A socket whose client sends these messages, and then waits."""

    def __init__(self, *messages: str | None):
        self.messages = list(messages)

    async def receive(self) -> dict:
        await asyncio.sleep(0)
        if not self.messages:
            await asyncio.sleep(3600)
        text = self.messages.pop(0)
        kind = "websocket.disconnect" if text is None else "websocket.receive"
        return {"type": kind, "text": text}


def test_a_client_that_leaves_ends_what_is_worked_on():
    talker = Silent()
    leaving = converse(Client("a", "slow", "b", None), talker, Limits())
    asyncio.run(asyncio.wait_for(leaving, 5))
    assert talker.taken in ([b"a"], [b"a", b"slow"])


def test_an_idle_socket_ends_with_an_error():
    with pytest.raises(ApiError, match=r"no message for 0\.1 s"):
        asyncio.run(converse(Client("a"), Silent(), Limits(socket_idle_seconds=0.1)))


def test_a_socket_is_not_idle_while_speech_is_sent():
    async def scenario() -> None:
        talker = Silent()
        talker.is_silent = False
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(converse(Client(), talker, Limits(socket_idle_seconds=0.05)), 1)

    asyncio.run(scenario())


def test_messages_that_wait_are_bounded():
    limits = Limits(body_bytes=20_000)
    with pytest.raises(ApiError, match="too many messages"):
        asyncio.run(converse(Client("slow", *["a"] * 100), Silent(), limits))


def test_messages_of_all_sockets_of_a_caller_are_bounded_together():
    """Also the one that is worked on; what a client that has left had sent is given back."""
    limits = Limits(body_bytes=20_000, pending_body_bytes=100_000)
    held = held_messages(limits)

    async def scenario() -> None:
        def sending(text: str, share: str) -> asyncio.Task:
            client = Client("slow", text)
            return asyncio.create_task(converse(client, Silent(), limits, held, share))

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
        held.check("one", 50_000)

    asyncio.run(scenario())


def test_messages_are_counted_in_bytes():
    limits = Limits(body_bytes=20_000)
    with pytest.raises(ApiError, match="too many messages"):
        asyncio.run(converse(Client("\U0001f600" * 6_000), Silent(), limits))


class Quiet(Gone):
    """A socket that keeps what it is sent."""

    def __init__(self):
        self.told = []

    async def send_json(self, message: dict) -> None:
        self.told.append(message)

    async def send_bytes(self, data: bytes) -> None:
        self.told.append(data)


def a_service(**more) -> SimpleNamespace:
    return SimpleNamespace(settings=Settings(), quotas=Quotas(0, 0), voices=None, **more)


def as_bytes(kind: str, **fields) -> bytes:
    return json.dumps({"type": kind, **fields}).encode()


def test_a_text_that_is_too_long_is_refused_before_it_is_cut():
    async def scenario() -> None:
        conversation = Conversation(a_service(), Quiet())
        for message in ("text", "say"):
            started = time.process_time()
            await conversation.take(as_bytes(message, text="a. " * 1_000_000))
            assert time.process_time() - started < 2
        assert [each["code"] for each in conversation._socket.told] == ["too_long"] * 2
        assert conversation._waiting.empty()

    asyncio.run(scenario())


def test_what_waits_to_be_spoken_is_bounded_in_characters():
    async def scenario() -> None:
        conversation = Conversation(a_service(), Quiet())
        for _ in range(50):
            await conversation.take(as_bytes("say", text="a" * 10_000))
        assert conversation._waiting.qsize() == MAX_WAITING_CHARACTERS // 10_000
        assert {each["code"] for each in conversation._socket.told} == {"queue_full"}

    asyncio.run(scenario())


def test_text_without_an_end_is_bounded():
    async def scenario() -> None:
        conversation = Conversation(a_service(), Quiet())
        for _ in range(3):
            await conversation.take(as_bytes("text", text="a" * 4000))
        (error,) = conversation._socket.told
        assert "characters without an end" in error["message"]
        assert not len(conversation._unfinished)

    asyncio.run(scenario())


def test_a_cancel_while_a_turn_is_submitted_silences_it():
    """Nothing of it is sent, and its request is cancelled."""

    async def scenario() -> None:
        class Spoken:
            num_cancels = 0

            def cancel(self) -> None:
                self.num_cancels += 1

        submitting, submitted, live = asyncio.Event(), asyncio.Event(), Spoken()

        async def speak(*_, **__) -> Spoken:
            submitting.set()
            await submitted.wait()
            return live

        async def admit(caller: Caller):
            return contextlib.nullcontext()

        socket = Quiet()
        service = a_service(speak=speak, admit=admit)
        async with Conversation(service, socket) as conversation:
            await conversation.take(as_bytes("say", text="one"))
            await asyncio.wait_for(submitting.wait(), 5)
            cancelling = asyncio.create_task(conversation.take(as_bytes("cancel")))
            await asyncio.sleep(0)
            submitted.set()
            await asyncio.wait_for(cancelling, 5)
        assert socket.told == [{"type": "cancelled"}]
        assert live.num_cancels

    asyncio.run(scenario())


def test_turns_beyond_the_window_are_dropped(model):
    """Frames and text take positions."""

    async def work(caller: Caller, function, *arguments):
        return function(*arguments)

    engine = SimpleNamespace(max_seq_len=100)
    conversation = Conversation(a_service(engine=engine, model=model, work=work), Gone())

    def remember(speaker: int, text: str, num_frames: int) -> list[int]:
        codes = np.zeros((num_frames, model.config.num_codebooks), np.int32)
        asyncio.run(conversation._remember(Segment(speaker, text, codes=codes)))
        return [turn.speaker for turn in conversation._turns]

    for number in range(10):
        kept = remember(number, "a", 40)
    assert kept == [8, 9]
    assert remember(10, "one two three " * 20, 1) == [10]
    assert remember(11, "a", 400) == [11]


def test_a_socket_that_is_not_read_counts_as_disconnected():
    """A message that cannot be sent within `write_seconds` is not waited for."""

    class Deaf(Gone):
        async def send_json(self, message: dict) -> None:
            await asyncio.sleep(3600)

    async def scenario() -> None:
        settings = Settings(limits=Limits(write_seconds=0.1))
        async with Conversation(SimpleNamespace(settings=settings), Deaf()) as conversation:
            with pytest.raises(WebSocketDisconnect):
                await asyncio.wait_for(conversation.take(b"{"), 5)

    asyncio.run(scenario())


def test_sockets_of_one_caller_are_counted(model):
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
