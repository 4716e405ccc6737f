"""The released weights, which need an account that has accepted their terms.

    CSM_JAX_REAL_WEIGHTS=DIR pytest -m real_weights

where DIR holds sesame/csm-1b, downloaded or converted. The expected tokens are published in
transformers' own test of CSM, which took them from the original implementation. The case with
audio runs if CSM_JAX_REAL_AUDIO names its recording, the first row of the dataset
hf-internal-testing/dailytalk-dummy.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import csm_jax
from csm_jax.io.audio import load_audio

pytestmark = pytest.mark.real_weights

DATA = Path(__file__).parent / "reference" / "data" / "csm_1b_greedy_tokens.json"
CASES = {case["name"]: case for case in json.loads(DATA.read_text())["cases"]}


@pytest.fixture(scope="module")
def model():
    directory = os.environ.get("CSM_JAX_REAL_WEIGHTS")
    assert directory, "CSM_JAX_REAL_WEIGHTS must name a directory with the weights"
    return csm_jax.load(directory, dtype="float32")


def segment(turn: dict, model: csm_jax.Generator) -> csm_jax.Segment:
    if "CSM_JAX_REAL_AUDIO" not in os.environ:
        pytest.skip("CSM_JAX_REAL_AUDIO must name the recording of this case")
    audio = load_audio(os.environ["CSM_JAX_REAL_AUDIO"], model.sample_rate)
    return csm_jax.Segment(turn["speaker"], turn["text"], audio)


@pytest.mark.parametrize("name", CASES)
def test_greedy_codes_equal_the_published_tokens(model, name):
    *context_turns, spoken = CASES[name]["turns"]
    context = [segment(turn, model) for turn in context_turns]
    greedy = csm_jax.Sampling(greedy=True)
    codes = model.generate_codes(spoken["text"], spoken["speaker"], context, greedy)
    expected = np.asarray(CASES[name]["codes"])
    assert not expected[-1].any(), "the published run ends in an end-of-speech frame"
    np.testing.assert_array_equal(codes, expected[:-1])
