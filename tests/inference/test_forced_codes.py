"""Codes that are forced come out, and all others are drawn as if the model had drawn those."""

import inpaint
import numpy as np
import pytest
from countdown import CONFIG, GREEDY, NUM_CODEBOOKS, count_from, countdown, counted
from fixtures import up_to_the_end
from hypothesis import given, settings
from hypothesis import strategies as st

from csm_jax import Engine, InputError, Interventions, Request, Sampling, Segment
from csm_jax.inference.decode_batch import DecodeBatch, Utterance

NUM_FRAMES, SEED = 20, 3
TEXT = "so it is"


@pytest.fixture(scope="module")
def num_codebooks(model) -> int:
    return model.config.num_codebooks


def request_for(forced=None, **fields) -> Request:
    values = {"seed": SEED, "guard": "off", "max_audio_length_ms": 80 * NUM_FRAMES} | fields
    return Request(TEXT, interventions=Interventions(forced), **values)


@pytest.fixture(scope="module")
def plain(model):
    """What is drawn when nothing is forced."""
    codes = model.generate_codes(request_for())
    assert len(codes) == NUM_FRAMES
    return codes


def masked(codes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A random share of the codes; the others are -1."""
    kept = np.random.default_rng(seed).random(codes.shape) < share
    return np.where(kept, codes, -1)


def other_codes(plain: np.ndarray) -> np.ndarray:
    return np.random.default_rng(7).integers(1, 30, plain.shape).astype(np.int32)


@settings(max_examples=5, deadline=None)
@given(share=st.floats(0.05, 0.95), seed=st.integers(0, 99), size=st.integers(1, NUM_FRAMES))
def test_forced_codes_come_out(model, plain, share, seed, size):
    forced = masked(other_codes(plain), share, seed)[:size]
    codes = model.generate_codes(request_for(forced))
    np.testing.assert_array_equal(codes[:size][forced >= 0], forced[forced >= 0])
    assert len(codes) == NUM_FRAMES


def test_forcing_nothing_changes_nothing(model, plain):
    codes = model.generate_codes(request_for(np.full_like(plain, -1)))
    np.testing.assert_array_equal(codes, plain)


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_forcing_what_would_be_drawn_changes_nothing(model, plain, share):
    """Each code has a random number of its own, whatever is forced before it."""
    codes = model.generate_codes(request_for(masked(plain, share, 1)))
    np.testing.assert_array_equal(codes, plain)


@pytest.mark.parametrize("columns", ["some", "codebook 0", "all but codebook 0"])
def test_free_codes_are_the_likeliest_after_the_forced_ones(model, plain, columns):
    """Greedy, by the scores of a teacher-forced pass over what came out."""
    forced = other_codes(plain)
    match columns:
        case "some":
            forced = masked(forced, 0.5, 2)
        case "codebook 0":
            forced[:, 1:] = -1
        case _:
            forced[:, 0] = -1
    context = [Segment(1, "before", codes=other_codes(plain)[:4])]
    fields = {"sampling": Sampling(greedy=True), "context": context}
    codes = model.generate_codes(request_for(forced, **fields))
    score = model.score(TEXT, codes, context=context)
    assert (score.rank[forced < 0] == 0).all()
    assert (score.rank[forced >= 0] > 0).mean() > 0.5


def test_given_frames_are_continued(model, plain):
    context = other_codes(plain)[:9]
    codes = model.generate_codes(request_for(context))
    np.testing.assert_array_equal(codes[:9], context)
    assert (codes[9:] != plain[9:]).any()


def test_a_frame_of_zeros_ends_the_speech(model, plain):
    """And an end that would be drawn before the last forced code is not taken."""
    forced = np.concatenate([other_codes(plain)[:6], np.zeros((1, plain.shape[1]), np.int32)])
    forced[2:5] = -1
    codes = model.generate_codes(request_for(forced))
    assert len(codes) == 6
    np.testing.assert_array_equal(codes[5], forced[5])


def test_speech_does_not_end_before_the_last_forced_code():
    """By a model that counts down to its end of speech."""
    forced = np.full((9, NUM_CODEBOOKS), -1, np.int32)
    forced[8, 2] = 5
    batch = DecodeBatch(CONFIG, countdown(), 2, 64)
    for index, codes in enumerate((None, forced)):
        batch.join(index, Utterance(count_from(3), GREEDY, 0, 20, forced=codes))
    free, held = batch.run(20).codes
    np.testing.assert_array_equal(up_to_the_end(free), counted(3))
    np.testing.assert_array_equal(held[:2], counted(3))
    # What would have been the end is so but for its last code.
    assert (held[2, :-1] == 0).all()
    assert (held[:9] != 0).any(axis=1).all()
    assert held[8, 2] == 5
    assert (held[9:] == 0).all(axis=1).any()


def test_streams_and_batches_have_the_same_codes(model, plain):
    """A request without forced codes is not changed by one beside it."""
    forced = masked(other_codes(plain), 0.5, 4)
    wanted = [request_for(), request_for(forced), request_for(forced[:3], seed=9)]
    expected = [model.generate_codes(request) for request in wanted]
    with Engine(model, max_batch=3) as engine:
        tickets = [engine.submit(request) for request in wanted]
        for ticket, codes in zip(tickets, expected, strict=True):
            np.testing.assert_array_equal(ticket.codes(), codes)
    streamed = np.concatenate(list(model.stream(wanted[1])))
    np.testing.assert_allclose(streamed, model.decode(expected[1]), atol=1e-4)


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        (np.zeros((2, 3, 1), int), "forced has shape"),
        ([[1.5] * 5], "expected whole numbers"),
        ([[-2] * 5], "forced ranges -2"),
        ([[10**6] * 5], "forced ranges 1000000"),
        ([[0] * 5, [1] * 5], "frame 0 of forced is the end of speech"),
        (np.ones((NUM_FRAMES + 1, 5), int), "at most 20: raise max_audio_length_ms"),
    ],
    ids=str,
)
def test_codes_that_cannot_be_forced_are_refused(model, num_codebooks, forced, message):
    array = np.asarray(forced)
    if array.ndim == 2:
        array = np.repeat(array[:, :1], num_codebooks, axis=1)
    with pytest.raises(InputError, match=message):
        model.generate_codes(request_for(array))


def test_forced_codes_need_a_text_of_one_part(model, num_codebooks):
    forced = Interventions(np.ones((2, num_codebooks), np.int32))
    with pytest.raises(InputError, match="longer than one part"):
        model.generate_codes("One thing. " * 60, interventions=forced)
    with pytest.raises(InputError, match="has pauses"):
        model.generate_codes("Now [pause:1s] then.", pauses=True, interventions=forced)
    with pytest.raises(InputError, match="interventions is of type dict"):
        model.generate_codes(TEXT, interventions={"forced": None})


@pytest.mark.long
def test_the_example_draws_part_of_the_speech_again(tmp_path, capsys):
    before, after = tmp_path / "before.wav", tmp_path / "after.wav"
    inpaint.main(["--text=three one four", f"--before={before}", f"--after={after}"])
    assert before.stat().st_size == after.stat().st_size
    assert "frames were drawn again" in capsys.readouterr().out
