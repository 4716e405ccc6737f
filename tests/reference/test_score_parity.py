"""Scores of given speech against the logits of transformers."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from sampling_oracle import filtered_probabilities

import csm_jax
import oracles
from csm_jax import Sampling, Segment
from csm_jax.inference.given_speech import read_speech

CONFIG = csm_jax.tiny()
RANDOM = np.random.default_rng(4)
FILTERED = Sampling(
    temperature=1.3, top_k=17, top_p=0.9, min_p=0.01, repetition_penalty=1.4, depth_top_k=11
)


def noise(num_frames: int) -> np.ndarray:
    shape = num_frames, CONFIG.num_codebooks
    return RANDOM.integers(0, CONFIG.codec.codebook_size, shape).astype(np.int32)


CONVERSATIONS = [
    [Segment(0, "alone", codes=noise(7))],
    [Segment(1, "before", codes=noise(9)), Segment(0, "x", codes=noise(40))],
    [Segment(3, None, codes=noise(2)), Segment(1, "no sound"), Segment(2, "empty", codes=noise(0))],
]


@torch.no_grad()
def reference_logits(reference, model, conversation) -> np.ndarray:
    """Of the last turn's frames and its end, [F + 1, Q, V]: the conversation alone, unpadded."""
    speech = read_speech(model, conversation)
    hidden = oracles.hf_hidden(reference, speech.prompt)[speech.start - 1 : -1]
    codes = np.concatenate([speech.codes, np.zeros((1, CONFIG.num_codebooks), np.int32)])
    first = reference.lm_head(hidden)[:, None]
    rest = oracles.hf_depth_logits(reference, hidden, codes)
    return torch.cat([first, rest], dim=1).double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.as_tensor(logits), dim=-1).numpy()


@pytest.mark.parametrize("max_batch", [1, 4])
def test_scores_of_a_ragged_batch_equal_transformers(reference, model, max_batch):
    scores = model.score_batch(CONVERSATIONS, max_batch=max_batch)
    for score, conversation in zip(scores, CONVERSATIONS, strict=True):
        logs = log_softmax(reference_logits(reference, model, conversation))
        codes = conversation[-1].codes
        np.testing.assert_array_equal(score.codes, codes)
        chosen = np.take_along_axis(logs[:-1], codes[..., None], axis=-1)
        np.testing.assert_allclose(score.log_probability, chosen[..., 0], atol=1e-4)
        np.testing.assert_allclose(score.end_log_probability, logs[-1, :, 0], atol=1e-4)
        entropy = -(np.exp(logs) * logs).sum(axis=-1)[:-1]
        np.testing.assert_allclose(score.entropy, entropy, atol=1e-4)
        # Ids that are equally likely but for rounding may come in any order.
        least, most = ((logs[:-1] > chosen + by).sum(axis=-1) for by in (1e-4, -1e-4))
        assert ((least <= score.rank) & (score.rank <= most)).all()
        assert score.total == pytest.approx(chosen.sum() + logs[-1, :, 0].sum(), abs=1e-2)


@pytest.mark.parametrize("sampling", [Sampling(), FILTERED], ids=["default", "filtered"])
def test_scores_of_generated_codes_are_those_of_the_draws(reference, model, sampling):
    """The distributions are recomputed in float64, by the definition of the filters."""
    context = CONVERSATIONS[1][:1]
    codes = model.generate_codes(
        "said", 2, context, sampling=sampling, max_audio_length_ms=800, seed=5, guard="off"
    )
    assert len(codes) == 10
    score = model.score("said", codes, 2, context, sampling)
    logits = reference_logits(reference, model, [*context, Segment(2, "said", codes=codes)])[:-1]
    for frame in range(len(codes)):
        used = np.unique(codes[:frame, 0])
        at = logits[frame, 0, used]
        factor = sampling.repetition_penalty
        logits[frame, 0, used] = np.where(at > 0, at / factor, at * factor)
    depth = Sampling(
        sampling.temperature, sampling.depth_top_k or sampling.top_k, sampling.top_p, sampling.min_p
    )
    probabilities = np.concatenate(
        [
            filtered_probabilities(logits[:, :1], sampling),
            filtered_probabilities(logits[:, 1:], depth),
        ],
        axis=1,
    )
    drawn = np.log(np.take_along_axis(probabilities, codes[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(score.log_probability, drawn, atol=1e-3)
    assert score.log_probability.sum() == pytest.approx(drawn.sum(), abs=1e-2)


def test_an_excluded_code_has_no_probability(model):
    codes = CONVERSATIONS[0][-1].codes
    plain = model.score("alone", codes)
    greedy = model.score("alone", codes, sampling=Sampling(greedy=True))
    np.testing.assert_array_equal(greedy.log_probability == 0, plain.rank == 0)
    assert np.isneginf(greedy.log_probability[plain.rank > 0]).all()
    np.testing.assert_array_equal(greedy.entropy, 0)
