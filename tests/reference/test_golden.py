"""Parity without torch, such as on a TPU: against files written by transformers.

`make_golden.py` writes them and describes their contents.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import generate
from safetensors.numpy import load_file

import csm_jax
from csm_jax.checkpoints import native_format
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.mimi.codec import Codec
from csm_jax.model.csm import bind
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.turns import Segment, join_rows, text_rows, turn_rows

GOLDEN = Path(__file__).parent / "golden"
CONFIG = csm_jax.tiny()
GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def params():
    opened = open_checkpoint(GOLDEN / "checkpoint")
    assert opened.config == CONFIG, "tiny() has changed: run make_golden.py"
    shapes = native_format.param_shapes(CONFIG)
    # Cast by numpy: accelerators flush subnormals, which some codebook sums are in float16.
    tensors = opened.tensors(native_format.flatten(shapes))
    return native_format.unflatten({p: t.astype(np.float32) for p, t in tensors}, shapes)


@pytest.fixture(scope="module")
def weights(params):
    """The parameters of the language model, on the device."""
    return jax.tree.map(jnp.asarray, params["csm"])


@pytest.fixture(scope="module")
def model(weights):
    return bind(CONFIG, weights)


@pytest.fixture(scope="module")
def codec(params):
    return Codec(CONFIG.codec, params["codec"])


def assert_close(ours, theirs, tolerance=1e-4):
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error < tolerance


@pytest.mark.parametrize("name", ["text", "audio"])
def test_backbone_equals_golden(model, expected, name):
    rows, mask = expected[f"{name}.frames"][None], expected[f"{name}.mask"][None]
    cache = KVCache.create(CONFIG.backbone, 1, rows.shape[1], jnp.float32, num_lengths=1)
    hidden, _ = model.backbone(model.embed(jnp.asarray(rows), jnp.asarray(mask)), cache)
    assert_close(hidden[0], expected[f"{name}.hidden"])
    assert_close(model.backbone_logits(hidden)[0], expected[f"{name}.logits"])


def test_depth_decoder_equals_golden(model, expected):
    hidden, codes = (jnp.asarray(expected[f"depth.{name}"]) for name in ("hidden", "codes"))
    assert_close(model.depth_logits(hidden, codes), expected["depth.logits"])


@pytest.mark.parametrize("name", ["text", "audio"])
def test_greedy_codes_equal_golden(weights, expected, name):
    prompt = expected[f"{name}.frames"], expected[f"{name}.mask"]
    codes = generate(CONFIG, weights, [prompt], [GREEDY], [0], 20)[0]
    np.testing.assert_array_equal(codes, expected[f"{name}.greedy"])


def test_greedy_codes_of_a_ragged_batch_equal_golden(weights, expected):
    prompts = [(expected[f"{n}.frames"], expected[f"{n}.mask"]) for n in ("text", "audio")]
    codes = generate(CONFIG, weights, prompts, [GREEDY] * 2, [0, 1], 20)
    np.testing.assert_array_equal(np.stack(codes), expected["batch.greedy"])


def test_codec_equals_golden(codec, expected):
    waveform = expected["codec.pcm"].astype(np.float32) / 32768
    np.testing.assert_array_equal(codec.encode(waveform), expected["codec.codes"])
    decoded = codec.decode(expected["codec.codes"][:10])
    # Relative to full scale, which matters for listening.
    assert np.abs(decoded - expected["codec.waveform"]).max() < 1e-4


def test_greedy_codes_of_a_chat_with_audio_equal_golden(weights, codec, expected):
    """The reference encodes the waveform itself; csm_jax encodes it in `turn_rows`."""
    ids = expected["chat.input_ids"].tolist()
    first, last = ids.index(CONFIG.text_token_ids.audio), ids.index(CONFIG.text_token_ids.audio_eos)

    class Recorded:
        """A tokenizer that returns the ids of the golden chat."""

        def encode(self, text):
            return ids[:first] if text == "[0]heard" else ids[last + 1 :]

    waveform = expected["codec.pcm"].astype(np.float32) / 32768
    heard = turn_rows(Segment(0, "heard", waveform), CONFIG, Recorded(), codec.encode)
    prompt = join_rows([*heard, text_rows("said", 1, CONFIG, Recorded())])
    codes = generate(CONFIG, weights, [prompt], [GREEDY], [0], 20)[0]
    np.testing.assert_array_equal(codes, expected["chat.greedy"])
