"""Calibration finds the head that follows the speech, or says that there is none."""

import numpy as np
import pytest

import csm_jax
from csm_jax import InputError
from csm_jax.align.calibration import calibrate
from csm_jax.align.recordings import Recording, attention_to
from csm_jax.inference.alignment.words import row_weights

TEXTS = ["four nine one", "two seven eight zero", "six three five", "one zero four nine"]


@pytest.fixture(scope="module")
def demo():
    return csm_jax.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def recordings(demo):
    """The model's own speech."""
    audio = demo.generate_batch(TEXTS, max_batch=4)
    return [Recording(text, each) for text, each in zip(TEXTS, audio, strict=True)]


def test_the_bundled_heads_are_found_from_its_own_speech(demo, recordings):
    """The bundled ones are from recordings of flite."""
    assert calibrate(demo, recordings).heads == demo.alignment.heads


def test_lags_are_from_the_attention_to_the_known_starts(demo, recordings):
    """Starts that are all later by some time have lags that are longer by that time."""

    def lags(delay: float) -> np.ndarray:
        timed = [
            Recording(each.text, each.audio, 0, delay + 0.3 * np.arange(len(each.text.split())))
            for each in recordings
        ]
        return np.array(calibrate(demo, timed).lags)

    np.testing.assert_allclose(lags(0.17) - lags(0.1), 0.07, atol=2e-3)


def test_random_weights_are_refused(recordings):
    with pytest.raises(InputError, match="no attention head follows the text"):
        calibrate(csm_jax.load("random:tiny"), recordings)


def test_starts_must_be_those_of_the_words(demo, recordings):
    wrong = [Recording(each.text, each.audio, 0, [0.1]) for each in recordings]
    with pytest.raises(InputError, match="3 words, but 1 starts"):
        calibrate(demo, wrong)


def test_attention_to_a_recording_goes_forward_through_its_words(demo, recordings):
    attention = attention_to(demo, recordings[1], demo.alignment.heads)
    words = (attention[:, 0] @ row_weights(TEXTS[1], 0, demo.tokenizer, demo.config)).argmax(axis=1)
    assert (np.diff(words) >= 0).mean() > 0.9
    assert set(words) == {0, 1, 2, 3}
    assert (attention.sum(axis=-1) <= 1 + 1e-5).all()
