"""Training conversations of the open-vocabulary voice: voices, speaker numbers, lengths."""

import json
import random
from pathlib import Path

import pytest
from conversations import TALKING, Recordings, draw_conversation
from plan import MAIN_VOICES
from speech_set import Utterance
from texts import is_held_out_text

from csm_jax.train.data import read_conversations

SECONDS = 30.0
THIRD = "af_bella"


def utterance(number: int, voice: str, units: int, dialogue: int) -> Utterance:
    audio = Path(f"/speech/{voice}/{number}.ogg")
    return Utterance(audio, f"text {number}", voice, "ab", (1, units, 1, 1), 0, dialogue)


@pytest.fixture(scope="module")
def utterances():
    """Dialogues of two turns in the main voices, and another voice; 0.1 to 25 s each."""
    source = random.Random(0)
    voices = [*MAIN_VOICES, *MAIN_VOICES, THIRD]
    return [
        utterance(i, voices[i % 5], source.randint(1, 1000), i // 2 * 2 if i % 5 < 4 else i)
        for i in range(600)
    ]


@pytest.fixture(scope="module")
def conversations(utterances):
    source = random.Random(1)
    recordings = Recordings(utterances)
    return [draw_conversation(source, recordings, SECONDS) for _ in range(3000)]


@pytest.fixture(scope="module")
def said_by(utterances):
    return {str(each.audio): each for each in utterances}


def test_held_out_texts_are_not_in_the_conversations(utterances, conversations):
    texts = {turn["text"] for turns in conversations for turn in turns}
    held_out = {each.text for each in utterances if is_held_out_text(each.text)}
    assert held_out
    assert texts == {each.text for each in utterances} - held_out


def test_a_speaker_has_a_main_voice_or_the_voice_of_the_turn_before(conversations, said_by):
    for turns in conversations:
        heard: dict[int, str] = {}
        for turn in turns:
            voice = said_by[turn["audio"]].voice
            expected = heard.get(turn["speaker"], MAIN_VOICES[turn["speaker"]])
            if turn.get("train", True):
                assert voice == expected
            heard[turn["speaker"]] = voice


def test_prompts_have_every_voice_and_either_speaker_number(conversations, said_by):
    prompts = {
        (turns[0]["speaker"], said_by[turns[0]["audio"]].voice)
        for turns in conversations
        if not turns[0].get("train", True)
    }
    assert prompts == {(number, voice) for number in (0, 1) for voice in (*MAIN_VOICES, THIRD)}
    assert all(turn.get("train", True) for turns in conversations for turn in turns[1:])
    assert all(any(turn.get("train", True) for turn in turns) for turns in conversations)


def test_conversations_fit_the_limit_and_some_reach_it(conversations, said_by):
    for turns in conversations:
        seconds = [said_by[turn["audio"]].seconds for turn in turns]
        assert sum(seconds) <= SECONDS or len(turns) <= 2
        assert len(turns) <= TALKING + 1
    assert max(map(len, conversations)) > 4


def test_csm_jax_finetune_reads_the_conversations(conversations, tmp_path):
    listed = tmp_path / "train.jsonl"
    listed.write_text("".join(json.dumps(turns) + "\n" for turns in conversations[:50]))
    found, problems = read_conversations(listed)
    assert len(found) == 50
    assert not problems
    assert all(any(turn.is_trainable for turn in each.turns) for each in found)
