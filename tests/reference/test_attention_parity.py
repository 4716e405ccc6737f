"""Attention that times words equals that of transformers: of the prompt and of generated frames."""

import itertools

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("torchtune")

from fixtures import params_of

import csm_jax
import oracles
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.inference.decode_batch import DecodeBatch, Utterance
from csm_jax.model.csm import bind
from csm_jax.model.precision import FLOAT32
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.turns import Prompt

CONFIG = csm_jax.tiny()
BACKBONE = CONFIG.backbone
HEADS = tuple(itertools.product(range(BACKBONE.num_layers), range(BACKBONE.num_heads)))
NUM_FRAMES = 20
NUM_IDS = (6, 11)
PROMPTS = [
    oracles.random_prompt(CONFIG, seed=3, num_ids=NUM_IDS[0], context=[(5, 11), (3, 4)]),
    oracles.random_prompt(CONFIG, seed=4, num_ids=NUM_IDS[1], context=[(4, 30)]),
]


@pytest.fixture(scope="module")
def reference():
    model = oracles.hf_model(CONFIG, seed=11)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def params(reference, tmp_path_factory):
    directory = oracles.save_hf(reference, tmp_path_factory.mktemp("huggingface"))
    return params_of(open_checkpoint(directory), FLOAT32)["csm"]


@pytest.fixture(scope="module")
def generated(params):
    """Codes [2, F, Q] and attention [2, F, N, L] of a ragged batch."""
    batch = DecodeBatch(CONFIG, params, 2, 128, heads=HEADS)
    for index, (frames, mask) in enumerate(PROMPTS):
        prompt = Prompt(np.asarray(frames, np.int32), np.asarray(mask, bool))
        num_text = NUM_IDS[index] + 2  # BOS and EOS
        sampling = Sampling(temperature=1.5)
        batch.join(index, Utterance(prompt, sampling, index, NUM_FRAMES, 0, num_text))
    runs = [batch.run(7), batch.run(13)]
    return tuple(np.concatenate([run[i] for run in runs], axis=1) for i in (0, 1))


def assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-4 * theirs.max()


def their_attention(reference, index: int, codes: np.ndarray) -> np.ndarray:
    """Attention of all heads, [N, T, T], in a pass over a prompt and the frames after it."""
    return oracles.hf_attention(
        reference, oracles.concatenate([PROMPTS[index], oracles.audio_rows(codes)])
    ).numpy()


@pytest.mark.parametrize("index", [0, 1])
def test_attention_of_the_frame_step_equals_transformers(reference, generated, index):
    codes, attention = (array[index] for array in generated)
    assert codes.shape == (NUM_FRAMES, CONFIG.num_codebooks)
    assert not (codes == 0).all(axis=-1).any(), "it has ended: other seed"
    length, num_text = len(PROMPTS[index][0]), NUM_IDS[index] + 2
    theirs = their_attention(reference, index, codes)
    # The query of the row before a frame predicts it; the text is the end of the prompt.
    expected = theirs[:, length - 1 : length - 1 + NUM_FRAMES, length - num_text : length]
    assert_equal(attention[..., :num_text], expected.transpose(1, 0, 2))
    assert expected.std(axis=1).max() > 0.01, "constants prove nothing"


@pytest.mark.parametrize("index", [0, 1])
def test_attention_of_a_teacher_forced_pass_equals_transformers(
    reference, params, generated, index
):
    codes = generated[0][index]
    frames, mask = oracles.concatenate([PROMPTS[index], oracles.audio_rows(codes)])

    @jax.jit
    def attend(params, frames, mask):
        return bind(CONFIG, params).attend(frames, mask, HEADS)[1].attention

    ours = attend(params, np.asarray(frames, np.int32)[None], np.asarray(mask, bool)[None])
    assert_equal(np.asarray(ours)[0], their_attention(reference, index, codes))
