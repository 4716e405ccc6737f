"""Scores of the bundled checkpoint's speech; their numbers are compared in `tests/reference`."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")
import surprise

import csm_jax
from csm_jax import InputError, Segment

TEXT = "three one four"


@pytest.fixture(scope="module")
def demo():
    return csm_jax.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def codes(demo):
    return demo.generate_codes(TEXT, seed=1)


def test_the_right_text_is_the_likeliest(demo, codes):
    texts = [TEXT, "three one five", "two one four", "three one", "three one four four"]
    scores = demo.score_batch([[Segment(0, text, codes=codes)] for text in texts])
    assert np.argmax([score.total for score in scores]) == 0


def test_the_end_is_likely_where_the_speech_ends(demo, codes):
    whole = demo.score(TEXT, codes)
    half = demo.score(TEXT, codes[: len(codes) // 2])
    assert whole.end_log_probability.sum() > half.end_log_probability.sum() + 3


def test_what_follows_does_not_change_a_score(demo, codes):
    whole, part = demo.score(TEXT, codes), demo.score(TEXT, codes[:5])
    np.testing.assert_allclose(whole.log_probability[:5], part.log_probability, atol=1e-4)


def test_audio_is_scored_by_its_codes(demo, codes):
    audio = demo.decode(codes)
    by_audio = demo.score(TEXT, audio)
    np.testing.assert_array_equal(by_audio.codes, demo.encode(audio))
    by_codes = demo.score(TEXT, demo.encode(audio))
    np.testing.assert_array_equal(by_audio.log_probability, by_codes.log_probability)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "a list of turns"),
        ([Segment(0, "text alone")], "the last turn must have a text and its speech"),
        ([Segment(0, None, codes=np.zeros((1, 4), int))], "the last turn must have a text"),
        ([Segment(0, "long", codes=np.ones((5000, 4), int))], "but the model has"),
        ([Segment(0, "three", codes=np.ones((5, 3), int))], "expected \\[num_frames, 4\\]"),
    ],
)
def test_conversations_without_speech_that_fits_are_refused(demo, conversation, message):
    with pytest.raises(InputError, match=message):
        demo.score_batch([conversation])


def test_no_conversations_have_no_scores(demo):
    assert demo.score_batch([]) == []
    with pytest.raises(InputError, match="max_batch is 0"):
        demo.score_batch([], max_batch=0)


def test_the_example_draws_a_picture(tmp_path, capsys):
    out = tmp_path / "surprise.png"
    surprise.main([f"--text={TEXT}", "--seed=1", f"--out={out}"])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "nats in" in capsys.readouterr().out
