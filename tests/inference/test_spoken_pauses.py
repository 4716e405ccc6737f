"""Pauses in texts are silence, and the model hears them."""

import dataclasses

import numpy as np
import pytest
from fixtures import CONFIG

import csm_jax
from csm_jax import Conversation, Engine, Request, Sampling, Segment

GREEDY = Sampling(greedy=True)
FRAME_SECONDS = 0.08
# The limit of each part: a model of random weights does not end.
LIMITED = {"sampling": GREEDY, "guard": "off"}


@pytest.fixture(scope="module")
def model(shallow):
    return csm_jax.load(shallow)


@pytest.fixture(scope="module")
def demo():
    return csm_jax.load("demo")


def silence(model, seconds: float) -> np.ndarray:
    """The codes of silence, from the codec alone: the last frame of two seconds of zeros."""
    frame = model.codec.encode(np.zeros(2 * 24_000, np.float32), CONFIG.num_codebooks)[-1]
    return np.tile(frame, (round(seconds / FRAME_SECONDS), 1))


def silences(audio: np.ndarray, level: float = 3e-3) -> list[float]:
    """The lengths in seconds of the stretches whose 10 ms are all under a level."""
    blocks = audio[: len(audio) // 240 * 240].reshape(-1, 240)
    quiet = np.sqrt(np.mean(blocks**2, axis=1)) < level
    edges = np.flatnonzero(np.diff(np.concatenate([[0], quiet, [0]]).astype(int)))
    return [float(end - start) / 100 for start, end in zip(edges[::2], edges[1::2], strict=True)]


def test_the_codes_are_those_of_the_parts_and_of_silence_between(demo):
    """The second part is spoken after a turn that is the first part and the silence."""
    request = Request("three one [pause:0.8s] four", pauses=True, sampling=GREEDY)
    first = demo.generate_codes("three one", sampling=GREEDY)
    heard = np.concatenate([first, np.tile(demo.silent_frame, (10, 1))])
    second = demo.generate_codes(
        "four", context=[Segment(0, "three one", codes=heard)], sampling=GREEDY
    )
    assert len(first) > 3 < len(second)
    wanted = np.concatenate([heard, second])
    np.testing.assert_array_equal(demo.generate_codes(request), wanted)
    with Engine(demo, max_batch=2) as engine:
        np.testing.assert_array_equal(engine.submit(request).codes(), wanted)
    np.testing.assert_allclose(
        np.concatenate(list(demo.stream(request))), demo.decode(wanted), atol=1e-4
    )


def test_a_pause_sounds_silent(demo):
    plain = Request("three one four", pauses=True, seed=3)
    paused = dataclasses.replace(plain, text="three one [pause:1.6s] four")
    assert max(silences(demo.generate(plain)), default=0) < 1
    longest = max(silences(demo.generate(paused)))
    assert longest == pytest.approx(1.6, abs=0.5)


def test_silence_before_the_text_is_released_with_the_first_frames(model):
    text = "[pause:0.4s] Hi. [pause:0.16s]"
    request = Request(text, pauses=True, max_audio_length_ms=960, **LIMITED)
    plain = dataclasses.replace(request, text="Hi.", max_audio_length_ms=560)
    spoken = model.generate_codes(plain)
    assert len(spoken) == 7
    wanted = np.concatenate([silence(model, 0.4), spoken])
    # The limit is that of speech and pauses together.
    np.testing.assert_array_equal(model.generate_codes(request), wanted)


def test_a_pause_at_the_limit_is_cut_with_a_notice(demo):
    notices = []
    request = Request("one [pause:30s] two", pauses=True, max_audio_length_ms=8_000)
    codes = demo.generate_codes(request, notify=notices.append)
    assert len(codes) == 100
    np.testing.assert_array_equal(codes[50:], np.tile(demo.silent_frame, (50, 1)))
    assert sum("1 of 2 parts" in notice.message for notice in notices) == 1


def test_without_a_limit_there_is_room_for_the_pauses(demo):
    codes = demo.generate_codes(Request("one [pause:20s] two", pauses=True, seed=1))
    assert len(codes) > 250


def test_without_the_option_nothing_changes(model):
    text = "One. [pause:0.5s] Two."
    request = Request(text, max_audio_length_ms=400, **LIMITED)
    marked = dataclasses.replace(request, text="One. Two.", pauses=True)
    plain = dataclasses.replace(marked, pauses=False)
    np.testing.assert_array_equal(model.generate_codes(marked), model.generate_codes(plain))
    assert not np.array_equal(model.generate_codes(request), model.generate_codes(plain))


def test_later_turns_have_the_transcript_without_marks(model):
    conversation = Conversation(model, pauses=True, max_audio_length_ms=400, guard="off")
    conversation.speak("One [pause:80ms] two.")
    for _ in conversation.stream("[pause] Three."):
        pass
    assert [turn.text for turn in conversation.turns] == ["One two.", "Three."]
