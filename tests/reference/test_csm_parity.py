"""The language model against transformers and torchtune, through the project's own converters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("torchtune")

import torch
from fixtures import generate, params_of

import csm_jax
import oracles
from csm_jax.checkpoints import native_format
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.model.csm import bind
from csm_jax.model.kv_cache import KVCache
from csm_jax.model.precision import FLOAT32, Precision
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.tokenizer import byte_tokenizer

CONFIG = csm_jax.tiny()
NUM_FRAMES = 50
GREEDY = Sampling(greedy=True)
# Seeds whose greedy runs have no near ties; `margin` checks it.
SEED = 11
PROMPTS = {
    "text": oracles.random_prompt(CONFIG, seed=1, num_ids=9),
    "audio": oracles.random_prompt(CONFIG, seed=2, num_ids=6, context=[(5, 11), (3, 4)]),
    "long": oracles.random_prompt(CONFIG, seed=5, num_ids=20, context=[(5, 60)]),
}


@pytest.fixture(scope="module")
def reference():
    return oracles.hf_model(CONFIG, SEED)


@pytest.fixture(scope="module")
def layouts(reference, tmp_path_factory):
    """The same weights, written by transformers and by a torchtune model, as csm_jax opens them."""
    root = tmp_path_factory.mktemp("layouts")
    huggingface = oracles.save_hf(reference, root / "huggingface")
    sesame = oracles.save_sesame(oracles.sesame_from_hf(reference, CONFIG), root / "sesame")
    return {
        "huggingface": open_checkpoint(huggingface),
        "sesame": open_checkpoint(
            sesame.parent if sesame.is_file() else sesame, codec_of(huggingface, root), CONFIG
        ),
    }


def codec_of(huggingface, root):
    """The codec alone, as a Hugging Face Mimi checkpoint."""
    import json

    from safetensors.torch import load_file, save_file

    directory = root / "codec"
    directory.mkdir()
    tensors = load_file(huggingface / "model.safetensors")
    prefix = "codec_model."
    codec = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    save_file(codec, directory / "model.safetensors")
    config = json.loads((huggingface / "config.json").read_text())["codec_config"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module", params=["huggingface", "sesame"])
def params(request, layouts):
    return params_of(layouts[request.param], FLOAT32)


def numpy_prompt(prompt):
    frames, mask = prompt
    return np.asarray(frames, np.int32), np.asarray(mask, bool)


@jax.jit
def backbone(params, frames, mask):
    model = bind(CONFIG, params["csm"])
    cache = KVCache.create(CONFIG.backbone, 1, frames.shape[1], model.dtype, num_lengths=1)
    hidden, _ = model.backbone(model.embed(frames, mask), cache)
    return hidden[0], model.backbone_logits(hidden)[0]


@jax.jit
def depth(params, hidden, codes):
    return bind(CONFIG, params["csm"]).depth_logits(hidden, codes)


def relative_error(ours, theirs) -> float:
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())


def test_reference_logits_differ_between_positions(reference):
    """A parity test on constants would prove nothing."""
    logits = oracles.hf_logits(reference, PROMPTS["long"])
    assert logits.std(dim=0).mean() > 0.1


@pytest.mark.parametrize("name", PROMPTS)
def test_backbone_logits_equal_transformers(params, reference, name):
    frames, mask = numpy_prompt(PROMPTS[name])
    hidden, logits = backbone(params, frames[None], mask[None])
    assert relative_error(hidden, oracles.hf_hidden(reference, PROMPTS[name])) < 1e-4
    assert relative_error(logits, oracles.hf_logits(reference, PROMPTS[name])) < 1e-4


def test_backbone_logits_equal_torchtune(layouts, reference):
    sesame = oracles.sesame_from_hf(reference, CONFIG)
    frames, mask = numpy_prompt(PROMPTS["long"])
    _, logits = backbone(params_of(layouts["sesame"], FLOAT32), frames[None], mask[None])
    assert relative_error(logits, sesame.logits(PROMPTS["long"])) < 1e-4


def test_depth_logits_equal_transformers(params, reference):
    hidden = oracles.hf_hidden(reference, PROMPTS["audio"])
    codes = PROMPTS["audio"][0][:, :-1]
    logits = depth(params, jnp.asarray(hidden.numpy()), np.asarray(codes, np.int32))
    assert relative_error(logits, oracles.hf_depth_logits(reference, hidden, codes)) < 1e-4


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_codes_equal_transformers(params, reference, name):
    theirs = oracles.hf_greedy(reference, PROMPTS[name], NUM_FRAMES)
    assert oracles.greedy_margin(reference, PROMPTS[name], theirs) > 1e-4, "a tie: other seed"
    ours = generate(
        CONFIG, params["csm"], [numpy_prompt(PROMPTS[name])], [GREEDY], [0], NUM_FRAMES
    )[0]
    assert ours.shape == (NUM_FRAMES, CONFIG.num_codebooks)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_greedy_codes_equal_torchtune(layouts, reference):
    sesame = oracles.sesame_from_hf(reference, CONFIG)
    theirs = oracles.greedy(sesame, PROMPTS["audio"], NUM_FRAMES)
    params = params_of(layouts["sesame"], FLOAT32)["csm"]
    prompt = numpy_prompt(PROMPTS["audio"])
    ours = generate(CONFIG, params, [prompt], [GREEDY], [0], NUM_FRAMES)[0]
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_greedy_codes_of_a_ragged_batch_equal_transformers(params, reference):
    theirs = oracles.hf_greedy_batch(reference, list(PROMPTS.values()), NUM_FRAMES)
    prompts = [numpy_prompt(prompt) for prompt in PROMPTS.values()]
    ours = generate(CONFIG, params["csm"], prompts, [GREEDY] * 3, [0, 1, 2], NUM_FRAMES)
    np.testing.assert_array_equal(np.stack(ours), theirs.numpy())


def test_both_layouts_hold_the_same_model(layouts):
    huggingface, sesame = (
        native_format.flatten(params_of(opened, FLOAT32)) for opened in layouts.values()
    )
    assert huggingface.keys() == sesame.keys()
    for path in huggingface:
        np.testing.assert_array_equal(huggingface[path], sesame[path], path)


def test_codes_after_context_audio_equal_transformers(layouts, reference):
    """transformers encodes the waveform itself; csm_jax runs the whole path of `generate_codes`."""
    num_frames, size = 13, CONFIG.codec.frame_size
    rng = np.random.default_rng(0)
    time = np.arange(num_frames * size) / CONFIG.codec.sample_rate
    waveform = 0.3 * np.sin(2 * np.pi * (150 + 200 * time) * time)
    waveform = (waveform + 0.02 * rng.standard_normal(len(time))).astype(np.float32)
    assert oracles.hf_code_margin(reference, torch.tensor(waveform)) > 1e-5, "a tie: other seed"
    tokenizer = byte_tokenizer(CONFIG)
    ids = CONFIG.text_token_ids
    chat = tokenizer.encode("[3]heard before") + [ids.audio] * num_frames + [ids.audio_eos]
    chat += tokenizer.encode("[1]said now")
    theirs = oracles.hf_greedy_from_audio(
        reference, torch.tensor(chat), [torch.tensor(waveform)], 20
    )
    model = csm_jax.Generator.from_params(
        CONFIG, params_of(layouts["huggingface"], FLOAT32), tokenizer, FLOAT32
    )
    context = [csm_jax.Segment(speaker=3, text="heard before", audio=waveform)]
    ours = model.generate_codes("said now", 1, context, GREEDY, max_audio_length_ms=1600)
    np.testing.assert_array_equal(ours, theirs.numpy())


# (weights, activations): with both of a narrow type, transformers' own logits are up to 1.7e-2
# (bfloat16) and 2.9e-3 (float16) from its float32; less where only weights are narrow, as on a CPU.
TOLERANCES = {
    ("bfloat16", "bfloat16"): 2e-2,
    ("float16", "float16"): 4e-3,
    ("bfloat16", "float32"): 1.3e-2,
    ("float16", "float32"): 2.5e-3,
}


@pytest.mark.parametrize(("weights", "activations"), TOLERANCES)
def test_narrow_types_stay_close_to_float32(layouts, reference, weights, activations):
    tolerance = TOLERANCES[weights, activations]
    precision = Precision(jnp.dtype(weights), jnp.dtype(activations))
    params = params_of(layouts["huggingface"], precision)
    frames, mask = numpy_prompt(PROMPTS["audio"])
    _, logits = backbone(params, frames[None], mask[None])
    assert relative_error(logits, oracles.hf_logits(reference, PROMPTS["audio"])) < tolerance
    codes = PROMPTS["audio"][0][:, :-1]
    theirs = oracles.hf_hidden(reference, PROMPTS["audio"])
    hidden = jnp.asarray(theirs.numpy(), activations)
    logits = depth(params, hidden, np.asarray(codes, np.int32))
    expected = oracles.hf_depth_logits(reference, theirs, codes)
    assert relative_error(logits, expected) < tolerance
