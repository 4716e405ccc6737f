"""`Conversation`: the codes of its turns are those of `generate_codes` with the same context."""

import itertools

import numpy as np
import pytest
from fixtures import CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

import csm_jax
from csm_jax import Conversation, Engine, InputError, Sampling, Segment

FRAME = CONFIG.codec.frame_size
LENGTH_MS = 240
SAMPLING = Sampling(temperature=0.8, top_k=9)
NOISE = 0.1 * np.random.default_rng(0).standard_normal(3 * FRAME).astype(np.float32)


@pytest.fixture(scope="module")
def model(shallow):
    return csm_jax.load(shallow)


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, max_batch=2, max_seq_len=512) as engine:
        yield engine


def conversation(speaker, turns=(), seed=0):
    return Conversation(
        speaker, turns, seed=seed, sampling=SAMPLING, max_audio_length_ms=LENGTH_MS, guard="off"
    )


def speak(talk: Conversation, text: str, speaker: int) -> np.ndarray:
    return talk.speak(text, speaker, notify=lambda _: None)


def stream(talk: Conversation, text: str, speaker: int) -> np.ndarray:
    return np.concatenate(list(talk.stream(text, speaker, notify=lambda _: None)))


def by_hand(model, turns, seed, num_given=0) -> list[np.ndarray]:
    """The codes of the turns without a recording, with the context and the seeds written out."""
    context, codes = list(turns[:num_given]), []
    for turn in turns[num_given:]:
        if turn.audio is None:
            spoken = model.generate_codes(
                turn.text,
                turn.speaker,
                context,
                SAMPLING,
                LENGTH_MS,
                seed=(seed + len(codes)) % 2**32,
                guard="off",
                notify=lambda _: None,
            )
            codes.append(spoken)
            turn = Segment(turn.speaker, turn.text, codes=spoken)
        context.append(turn)
    return codes


SCRIPT = [
    Segment(0, "Who is there?", NOISE),
    Segment(1, "Me."),
    Segment(0, "Oh.", NOISE[:FRAME]),
    Segment(0, "Come in."),
    Segment(2, "Thank you."),
]


@pytest.mark.parametrize(
    ("kind", "way"), list(itertools.product(["alone", "in an engine"], [speak, stream]))
)
def test_codes_are_those_of_the_same_context_written_by_hand(model, engine, kind, way):
    talk = conversation(model if kind == "alone" else engine, SCRIPT[:1], seed=7)
    for turn in SCRIPT[1:]:
        if turn.audio is None:
            audio = way(talk, turn.text, turn.speaker)
            # The codec rounds a frame by itself a little differently.
            wanted = model.decode(talk.turns[-1].codes)
            np.testing.assert_allclose(audio, wanted, atol=1e-4)
        else:
            talk.add(turn)
    spoken = [turn.codes for turn in talk.turns if turn.codes is not None]
    for codes, wanted in zip(spoken, by_hand(model, SCRIPT, 7, num_given=1), strict=True):
        np.testing.assert_array_equal(codes, wanted)
    assert [(turn.speaker, turn.text) for turn in talk.turns] == [
        (turn.speaker, turn.text) for turn in SCRIPT
    ]


TURNS = st.builds(
    Segment,
    st.integers(0, 3),
    st.sampled_from(["Yes.", "No.", "Well then."]),
    st.sampled_from([None, None, NOISE[:FRAME], NOISE]),
)


@settings(max_examples=10, deadline=None)
@given(turns=st.lists(TURNS, max_size=4), seed=st.sampled_from([0, 1, 2**32 - 1]))
def test_any_conversation_is_the_one_written_by_hand(model, turns, seed):
    talk = conversation(model, seed=seed)
    for turn in turns:
        if turn.audio is None:
            speak(talk, turn.text, turn.speaker)
        else:
            talk.add(turn)
    spoken = [turn.codes for turn in talk.turns if turn.codes is not None]
    for codes, wanted in zip(spoken, by_hand(model, turns, seed), strict=True):
        np.testing.assert_array_equal(codes, wanted)


def test_the_seed_of_a_turn_counts_the_spoken_turns_before_it(model):
    talk = conversation(model, seed=2**32 - 1)
    seeds = []
    for turn in SCRIPT:
        if turn.audio is None:
            seeds.append(talk.request(turn.text).seed)
            talk.add_spoken(turn.text, turn.speaker, np.zeros((1, CONFIG.num_codebooks), np.int32))
        else:
            talk.add(turn)
    assert seeds == [2**32 - 1, 0, 1]


def test_a_turn_can_have_a_seed_of_its_own(model):
    talk = conversation(model, seed=3)
    talk.speak("Yes.", seed=11, notify=lambda _: None)
    wanted = model.generate_codes(
        "Yes.", 0, (), SAMPLING, LENGTH_MS, seed=11, guard="off", notify=lambda _: None
    )
    np.testing.assert_array_equal(talk.turns[-1].codes, wanted)
    assert talk.next_seed == 4


@pytest.mark.parametrize("kind", ["alone", "in an engine"])
def test_a_turn_that_is_interrupted_has_the_frames_that_were_played(model, engine, kind):
    talk = conversation(model if kind == "alone" else engine, seed=7)
    talk.max_audio_length_ms = 8000
    chunks = talk.stream("Well then.", 1)
    played = next(chunks)
    chunks.close()
    (turn,) = talk.turns
    assert len(turn.codes) == len(played) // FRAME
    whole = model.generate_codes(
        "Well then.", 1, (), SAMPLING, 8000, seed=7, guard="off", notify=lambda _: None
    )
    np.testing.assert_array_equal(turn.codes, whole[: len(turn.codes)])
    assert talk.num_spoken == 1


@pytest.mark.parametrize("way", [speak, stream])
@pytest.mark.parametrize("kind", ["alone", "in an engine"])
def test_a_turn_that_fails_is_not_added(model, engine, kind, way):
    talk = conversation(model if kind == "alone" else engine)
    talk.max_audio_length_ms = 10
    with pytest.raises(InputError, match="one frame takes"):
        way(talk, "Yes.", 0)
    assert (talk.turns, talk.num_spoken) == ([], 0)


@pytest.mark.parametrize("way", ["speak", "stream"])
@pytest.mark.parametrize("kind", ["alone", "in an engine"])
def test_notices_are_passed_on(model, engine, kind, way):
    talk = conversation(model if kind == "alone" else engine)
    notices = []
    list(getattr(talk, way)("Yes.", notify=notices.append))
    assert [notice.kind for notice in notices] == ["cut"]


def test_a_context_beyond_the_window_drops_its_oldest_turns_and_stays_in_the_conversation(model):
    long = Segment(0, "Before.", np.tile(NOISE, 50))
    talk = conversation(model, [long] * 8)
    notices = []
    talk.speak("Yes.", notify=notices.append)
    assert notices[0].kind == "context_dropped"
    assert len(talk.turns) == 9
