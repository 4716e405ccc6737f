"""OpenAI's chat API with the real `openai` client: turns equal those of the library."""

import base64
import io
import json
import wave

import numpy as np
import openai
import pytest
from serving import SMALL, as_samples, serve

from csm_jax import Conversation, Segment
from csm_jax.serve.api import spoken_turns
from csm_jax.serve.api.chat_messages import Message, Speakers, read_script
from csm_jax.serve.api.spoken_turns import SpokenTurn, SpokenTurns
from csm_jax.serve.errors import ApiError
from csm_jax.serve.settings import Settings

PATH = "/v1/chat/completions"
SEED = 7
TEXTS = ("one two three", "four five")
SPEAKERS = Speakers(user=1, assistant=0)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, messages, **fields):
    fields = {"audio": {"voice": "0", "format": "wav"}, "seed": SEED} | fields
    modalities = ["text", "audio"]
    return client.chat.completions.create(
        model="csm-1b", modalities=modalities, messages=messages, **fields
    )


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def spoken(audio) -> dict:
    return {"role": "assistant", "audio": {"id": audio.id}}


def samples(audio) -> np.ndarray:
    return as_samples(base64.b64decode(audio.data))


def audio_deltas(chunks) -> list[dict]:
    """What the chunks of a stream say of the audio; older clients have no type for it."""
    deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks if chunk.choices]
    given = [delta["audio"] for delta in deltas if delta.get("audio")]
    return [{k: v for k, v in audio.items() if v is not None} for audio in given]


def post(server, **fields):
    return server.post(PATH, json={"messages": [user("one")]} | fields)


@pytest.fixture(scope="module")
def turns(client):
    """Two turns that are spoken, the second after the first."""
    first = complete(client, [user(TEXTS[0])]).choices[0].message.audio
    messages = [user(TEXTS[0]), spoken(first), user(TEXTS[1])]
    return first, complete(client, messages).choices[0].message.audio


def test_two_turns_equal_those_of_the_library(server, turns):
    conversation = Conversation(server.service.model, max_audio_length_ms=10_000)
    for text, audio in zip(TEXTS, turns, strict=True):
        expected = conversation.speak(text, 0, seed=SEED)
        np.testing.assert_allclose(samples(audio), np.clip(expected, -1, 1), atol=1e-4)


def test_a_dialogue_equals_that_of_the_library(server, client, turns, recording, transcript):
    """The user's recording is context, of another speaker than the assistant."""
    data = base64.b64encode(recording).decode()
    content = [
        {"type": "text", "text": transcript},
        {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}},
    ]
    last = {"role": "assistant", "content": TEXTS[1]}
    messages = [user(TEXTS[0]), spoken(turns[0]), {"role": "user", "content": content}, last]
    audio = complete(client, messages).choices[0].message.audio
    conversation = Conversation(server.service.model, max_audio_length_ms=10_000)
    conversation.speak(TEXTS[0], 0, seed=SEED)
    conversation.add(Segment(1, transcript, as_samples(recording)))
    expected = conversation.speak(TEXTS[1], 0, seed=SEED)
    np.testing.assert_allclose(samples(audio), np.clip(expected, -1, 1), atol=1e-4)


def test_turns_of_a_server_with_a_normalizer_equal_those_of_the_library(model):
    """The text of a message that was spoken is no turn of its own, though it was normalized."""
    pytest.importorskip("num2words")
    with serve(model, Settings(**SMALL, normalize=True)) as running:
        body = {"audio": {"voice": "0"}, "seed": SEED}
        fields = body | {"messages": [user("1 2 3")]}
        message = running.post(PATH, json=fields).json()["choices"][0]["message"]
        assert message["audio"]["transcript"] == TEXTS[0]
        fields = body | {"messages": [user("1 2 3"), message, user("4 5")]}
        second = running.post(PATH, json=fields).json()["choices"][0]["message"]["audio"]
    conversation = Conversation(model, max_audio_length_ms=10_000)
    for text in TEXTS:
        expected = conversation.speak(text, 0, seed=SEED)
    audio = as_samples(base64.b64decode(second["data"]))
    np.testing.assert_allclose(audio, np.clip(expected, -1, 1), atol=1e-4)


def test_the_response_has_the_fields_of_openai(client):
    completion = complete(client, [user(TEXTS[0])])
    [choice] = completion.choices
    message = choice.message
    assert completion.object == "chat.completion"
    assert completion.model == "csm-1b"
    assert (choice.finish_reason, message.role, message.content) == ("stop", "assistant", None)
    assert message.audio.transcript == TEXTS[0]
    assert 3500 < message.audio.expires_at - completion.created <= 3601
    with wave.open(io.BytesIO(base64.b64decode(message.audio.data))) as file:
        assert file.getnframes() == 1920 * completion.usage.completion_tokens
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens > 0


def test_the_message_of_a_response_can_be_sent_back(client, turns):
    """With all its fields, as clients append it to their list."""
    message = complete(client, [user(TEXTS[0])]).choices[0].message
    messages = [user(TEXTS[0]), message, user(TEXTS[1])]
    assert complete(client, messages).choices[0].message.audio.data == turns[1].data


@pytest.mark.parametrize("form", ["pcm16", "wav", "mp3"])
def test_a_stream_has_the_same_speech(client, form):
    options = {"include_usage": True}
    audio = {"voice": "slt", "format": form}
    chunks = list(
        complete(client, [user(TEXTS[0])], audio=audio, stream=True, stream_options=options)
    )
    parts = audio_deltas(chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(part.get("transcript", "") for part in parts) == TEXTS[0]
    assert len({part["id"] for part in parts}) == 1
    assert parts[-1]["expires_at"] > chunks[0].created
    assert chunks[-2].choices[0].finish_reason == "stop"
    # Clients decode each piece, or all together.
    data = [part["data"] for part in parts if "data" in part]
    streamed = b"".join(map(base64.b64decode, data))
    assert streamed == base64.b64decode("".join(data))
    whole = complete(client, [user(TEXTS[0])], audio=audio)
    assert chunks[-1].usage == whole.usage
    if form == "mp3":
        assert len(as_samples(streamed)) > 20_000
        return
    file = base64.b64decode(whole.choices[0].message.audio.data)
    one, two = (np.frombuffer(each[len(each) % 1920 :], "<i2") for each in (streamed, file))
    assert np.abs(one.astype(int) - two).max() <= 1


def test_the_speech_of_a_stream_is_found_again(client, turns):
    parts = audio_deltas(complete(client, [user(TEXTS[0])], stream=True))
    reference = {"role": "assistant", "audio": {"id": parts[0]["id"]}}
    second = complete(client, [user(TEXTS[0]), reference, user(TEXTS[1])])
    assert second.choices[0].message.audio.data == turns[1].data


def test_the_least_that_a_client_sends(server):
    response = post(server, max_audio_length_ms=400)
    assert response.status_code == 200
    assert response.headers["x-notices"] == "cut"
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert base64.b64decode(choice["message"]["audio"]["data"]).startswith(b"RIFF")


def test_what_is_not_followed_is_reported(server):
    messages = [{"role": "system", "content": "Be kind."}, user("one") | {"mood": "glad"}]
    fields = {"messages": messages, "model": "gpt-5", "tools": [], "max_tokens": 100}
    kinds = post(server, **fields, max_audio_length_ms=400).headers["x-notices"].split(",")
    assert set(kinds) - {"cut"} == {
        "instructions_ignored",
        "max_tokens_ignored",
        "model_ignored",
        "mood_ignored",
        "tools_ignored",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "Hi."}]}, "no text"),
        ({"messages": [{"role": "user", "content": []}]}, "no text"),
        ({"messages": [user(" \u200b")]}, "the text is empty"),
        ({"messages": [{"role": "tool", "content": "Hi."}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "assistant", "audio": {"id": "x"}}, user("a")]}, "no audio 'x'"),
        ({"modalities": ["text"]}, "modalities"),
        ({"audio": {"format": "midi"}}, "audio.format"),
        ({"audio": {"voice": "nobody"}}, "no voice 'nobody'"),
        ({"n": 2}, "n"),
    ],
)
def test_errors_name_the_invalid_field(server, fields, message):
    response = post(server, **fields)
    assert response.status_code == 400
    assert message in response.json()["detail"]


def test_speech_is_found_by_its_owner_only(model):
    with serve(model, Settings(**SMALL, api_keys=("first-key", "second-key"))) as running:

        def post_as(key: str | None, messages: list[dict]):
            body = {"messages": messages, "max_audio_length_ms": 400}
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return running.post(PATH, json=body, headers=headers)

        first = post_as("first-key", [user("one")]).json()["choices"][0]["message"]
        messages = [json.loads(json.dumps(first)), user("two")]
        assert post_as("first-key", messages).status_code == 200
        assert post_as("second-key", messages).status_code == 400
        assert post_as(None, messages).status_code == 401


class TestScript:
    """Messages as turns; `found` is the only earlier speech."""

    FOUND = SpokenTurn("", "Hi.", "Hi.", np.zeros((2, 4), np.int16), 0)

    def read(self, *messages: dict):
        parsed = [Message.model_validate(message) for message in messages]
        script = read_script(parsed, SPEAKERS, {"found": self.FOUND}.get)
        return script.text, [(turn.speaker, turn.text) for turn in script.turns]

    def test_texts_are_turns_of_text(self):
        messages = [user("Who is it?"), {"role": "assistant", "content": "Me."}, user("Come in.")]
        assert self.read(*messages) == ("Come in.", [(1, "Who is it?"), (0, "Me.")])

    def test_a_text_that_was_spoken_is_no_turn_of_its_own(self):
        audio = {"role": "assistant", "audio": {"id": "found"}}
        assert self.read(user("Hi."), audio, user("Bye.")) == ("Bye.", [(0, "Hi.")])
        other = self.read(user("Well?"), audio, user("Bye."))
        assert other == ("Bye.", [(1, "Well?"), (0, "Hi.")])

    def test_recordings_and_their_transcripts(self):
        sound = {"type": "input_audio", "input_audio": {"data": "AAAA"}}
        text = {"type": "text", "text": "a b"}
        last = {"type": "text", "text": "Go on."}
        assert self.read({"role": "user", "content": [sound, last]}) == ("Go on.", [(1, "")])
        content = [text, sound, last]
        assert self.read({"role": "user", "content": content}) == ("Go on.", [(1, "a b")])
        two = {"role": "user", "content": [text, sound, text, sound]}
        assert self.read(two, user("Yes.")) == ("Yes.", [(1, "a b"), (1, "a b")])
        with pytest.raises(ApiError, match="2 recordings and 1 texts"):
            self.read({"role": "user", "content": [text, sound, sound]}, user("Yes."))


class TestSpokenTurns:
    def test_the_oldest_make_room_within_an_owner(self):
        turns = SpokenTurns(max_frames=1000, owner_frames=100)
        for number in range(5):
            turns.add(f"a{number}", "a", "hello", "hello", np.zeros((40, 32), np.int32))
            turns.add(f"b{number}", "b", "hello", "hello", np.zeros((1, 32), np.int32))
        assert [n for n in range(5) if turns.find(f"a{n}", "a")] == [3, 4]
        assert [n for n in range(5) if turns.find(f"b{n}", "b")] == [1, 2, 3, 4]

    def test_the_total_is_limited(self):
        turns = SpokenTurns(max_frames=100, owner_frames=80)
        for number in range(9):
            turns.add(f"{number}", f"{number}", "hello", "hello", np.zeros((40, 32), np.int32))
        assert [n for n in range(9) if turns.find(f"{n}", f"{n}")] == [7, 8]

    def test_they_expire(self, monkeypatch):
        now = [1e9]
        monkeypatch.setattr(spoken_turns.time, "time", lambda: now[0])
        turns = SpokenTurns()
        kept = turns.add("x", "", "hello", "hello", np.zeros((40, 32), np.int32))
        now[0] = kept.expires_at - 1
        assert turns.find("x", "") is not None
        assert turns.find("x", "other") is None
        now[0] = kept.expires_at
        assert turns.find("x", "") is None
