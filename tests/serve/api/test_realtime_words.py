"""Words of a conversation while they are spoken, and what stays of a turn after a barge-in."""

import itertools
import math

import numpy as np
import pytest
from talking import Talk
from websockets.sync.client import connect

from csm_jax import Request, Segment, Word
from csm_jax.serve.api.turn_history import SpokenTurn

TEXT = "One two, three four!"


@pytest.fixture
def talk(server):
    with connect(server.url.replace("http", "ws") + "/v1/realtime") as socket:
        yield Talk(socket)


@pytest.fixture(scope="module")
def voice(server) -> Segment:
    return server.service.voices.find("slt", "").turn(0)


@pytest.fixture(scope="module")
def expected(server, voice) -> tuple[np.ndarray, list[Word]]:
    """The codes and the words of the library for the same request."""
    words: list[Word] = []
    request = Request(TEXT, 0, [voice], seed=3)
    return server.service.model.generate_codes(request, on_word=words.append), words


def say(talk: Talk, text: str = TEXT, **fields) -> list:
    """Has a turn spoken, and returns all messages until it is done."""
    talk.send("say", text=text, voice="slt", speaker=0, **{"seed": 3} | fields)
    return list(receive_until(talk, "done"))


def receive_until(talk: Talk, kind: str):
    while True:
        yield (message := talk.receive())
        if not isinstance(message, bytes) and message["type"] == kind:
            return


def sound_of(messages: list) -> np.ndarray:
    data = b"".join(each for each in messages if isinstance(each, bytes))
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def test_words_are_those_of_the_library_and_come_with_their_audio(talk, expected):
    messages = say(talk, words=True)
    seconds, rows = 0.0, []
    for message in messages:
        if isinstance(message, bytes):
            seconds += len(message) / 48_000
        elif message["type"] == "words":
            assert message["id"] == 1
            rows += message["words"]
            assert seconds - message["words"][-1]["end"] < 1
    assert [row["text"] for row in rows] == TEXT.split()
    for row, word in zip(rows, expected[1], strict=True):
        assert (row["start"], row["end"]) == pytest.approx((word.start, word.end), abs=1e-3)
    assert messages[-1]["text"] == TEXT


def test_words_are_told_only_if_they_are_asked_for(talk):
    kinds = {each["type"] for each in say(talk) if not isinstance(each, bytes)}
    assert kinds == {"started", "done"}
    assert talk.ask("session", words=True)["words"]
    assert "words" in {each["type"] for each in say(talk) if not isinstance(each, bytes)}


@pytest.mark.parametrize("num_words", [1, 2, 3, 4])
def test_only_the_words_that_were_played_stay(talk, server, voice, expected, num_words):
    """The next turn is what the library says after these words, and their codes."""
    codes, words = expected
    say(talk)
    last = words[num_words - 1]
    heard_ms = 1000 * (0.3 * last.start + 0.7 * last.end)
    text = " ".join(word.text for word in words[:num_words])
    cancelled = talk.ask("cancel", audio_end_ms=heard_ms)
    assert cancelled == {"type": "cancelled", "id": 1, "text": text}
    sound = sound_of(say(talk, "five six", seed=4))
    heard = Segment(0, text, codes=codes[: math.ceil(last.end / 0.08 - 1e-6)])
    again = server.service.model.generate("five six", 0, [voice, heard], seed=4)
    np.testing.assert_allclose(sound, np.clip(again, -1, 1), atol=1e-3)


def test_utterances_after_the_one_that_was_played_were_not_heard(talk):
    for _ in range(3):
        say(talk)
    talk.ask("turn", speaker=1, text="nine")
    assert talk.ask("cancel", id=2, audio_end_ms=600_000)["text"] == TEXT
    assert talk.ask("turn", speaker=1, text="nine")["turns"] == 4


def test_a_turn_of_which_no_word_was_heard_is_forgotten(talk):
    say(talk)
    assert talk.ask("cancel", audio_end_ms=0) == {"type": "cancelled", "id": 1, "text": ""}
    assert talk.ask("turn", speaker=1, text="nine")["turns"] == 1


def test_a_cancelled_turn_keeps_the_words_that_were_sent(talk, expected):
    long = " ".join(itertools.repeat(TEXT, 5))
    talk.send("say", text=long, voice="slt", speaker=0, seed=3, words=True)
    told: list[dict] = []
    while len(told) < 2:
        message = talk.receive()
        told += message.get("words", []) if isinstance(message, dict) else []
    talk.send("cancel")
    *_, done = receive_until(talk, "done")
    assert done["cancelled"]
    kept = done["text"]
    assert long.startswith(kept)
    assert kept.startswith(" ".join(word["text"] for word in told if word["end"] < done["seconds"]))
    assert 1 <= len(kept.split()) < len(long.split())
    assert talk.receive() == {"type": "cancelled"}


def test_an_utterance_that_does_not_exist_is_an_error(talk):
    error = talk.ask("cancel", id=7, audio_end_ms=100)
    assert (error["type"], error["param"]) == ("error", "id")
    assert "no utterance 7" in error["message"]
    assert talk.ask("cancel", audio_end_ms=100) == {"type": "cancelled", "id": 0, "text": ""}


def spoken(words: list[Word] | None, num_frames: int = 20) -> SpokenTurn:
    return SpokenTurn(1, 0, "one  two, three", np.zeros((num_frames, 32), np.int32), words)


WORDS = [Word("one", 0.1, 0.4, 0.9), Word("two,", 0.5, 0.9, 0.9), Word("three", 1.0, 1.4, 0.9)]


@pytest.mark.parametrize(
    ("seconds", "text", "num_frames"),
    [
        (0.2, None, 0),
        (0.3, "one", 5),
        (0.6, "one", 5),
        (0.71, "one  two,", 12),
        (9, "one  two, three", 18),
    ],
)
def test_a_word_is_heard_if_half_of_it_is(seconds, text, num_frames):
    heard = spoken(WORDS).heard(seconds, 0.08)
    assert (heard.text if heard else None) == text
    assert (len(heard.codes) if heard else 0) == num_frames


def test_a_word_that_was_left_out_does_not_end_what_was_heard():
    words = [WORDS[0], Word("two,", 0.4, 0.4, 0.0, spoken=False), WORDS[2]]
    assert spoken(words).heard(0.5, 0.08).text == "one"
    assert spoken(words).heard(1.3, 0.08).text == "one  two, three"


def test_without_times_of_words_the_text_is_kept_and_the_codes_are_cut():
    for num_frames in range(1, 20):
        heard = spoken(None).heard(num_frames * 0.08, 0.08)
        assert (heard.text, len(heard.codes)) == ("one  two, three", num_frames)
    assert spoken(None).heard(0.07, 0.08) is None
