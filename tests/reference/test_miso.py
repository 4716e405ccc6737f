"""MisoTTS: its shapes at full size, and its codes at a small one, against the reference and back.

The reference is `SesameModel`, whose stacks are made as those of MisoLabsAI/MisoTTS (`models.py`).
"""

import dataclasses
import json
import math

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("torchtune")

import fixtures
import torch
import transformers

import csm_jax
import oracles
from csm_jax.checkpoints import native_format
from csm_jax.convert import __main__ as convert
from csm_jax.convert import flavors
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.convert.rules import plan

TINY = csm_jax.tiny()
# The ratios of MisoTTS: 4 query heads to a kv head in both stacks, MLPs of 3.5 and 4.5.
SMALL = dataclasses.replace(
    TINY,
    backbone=dataclasses.replace(
        TINY.backbone, num_heads=8, num_kv_heads=2, head_dim=8, embed_dim=64, mlp_dim=224
    ),
    depth_decoder=dataclasses.replace(
        TINY.depth_decoder, num_heads=24, num_kv_heads=6, head_dim=4, embed_dim=96, mlp_dim=432
    ),
    space_after_speaker=True,
    default_max_audio_length_ms=90_000,
)
TEXT, SPEAKER, NUM_FRAMES = "  Say this.", 1, 12
SEED = 3


def test_the_reference_at_full_size_is_recognized_by_its_shapes(tmp_path):
    """The file has its shapes and no config.json; its 33 GB are a hole that takes no space."""
    with torch.device("meta"):
        tensors = oracles.SesameModel(csm_jax.miso_8b()).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    content = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    codec = fixtures.write_codec(tmp_path / "codec", "kyutai_codec")
    opened = open_checkpoint(tmp_path, codec)
    assert opened.config == csm_jax.miso_8b()

    model, _ = opened.parts
    shapes = native_format.flatten(native_format.param_shapes(opened.config)["csm"])
    plan(model.table, model.source, shapes)  # refuses a tensor or a shape that does not fit
    sizes = [math.prod(shape.shape) for shape in shapes.values()]
    assert sum(sizes) == sum(tensor.numel() for tensor in tensors.values()) == 8_188_122_112


@pytest.fixture(scope="module")
def reference():
    return oracles.hf_model(SMALL, SEED)


@pytest.fixture(scope="module")
def expected(reference):
    """Greedy codes of the reference's own loop, for the prompt of its `generator.py`."""
    ids = fixtures.TOKENIZER.encode(f"[{SPEAKER}] {TEXT.lstrip()}")
    prompt = oracles.text_rows(SMALL, torch.tensor(ids))
    codes = oracles.greedy(oracles.sesame_from_hf(reference, SMALL), prompt, NUM_FRAMES)
    assert oracles.greedy_margin(reference, prompt, codes) > 1e-4, "a tie: other seed"
    return codes.numpy()


@pytest.fixture(scope="module")
def native(reference, tmp_path_factory):
    """Written by the reference without a config.json, recognized by its shapes, and converted."""
    root = tmp_path_factory.mktemp("miso")
    source = oracles.save_sesame(oracles.sesame_from_hf(reference, SMALL), root / "source")
    (source / "config.json").unlink()
    fixtures.TOKENIZER.save(source)
    codec = fixtures.write_codec(root / "codec", "kyutai_codec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(flavors.FLAVORS, "small", SMALL.backbone)
        patch.setitem(flavors.FLAVORS, "small depth", SMALL.depth_decoder)
        patch.setitem(flavors.MODELS, "small", SMALL)
        flags = [f"--source={source}", f"--codec={codec}", f"--out={root / 'native'}"]
        assert convert.run(flags) == 0
    return root / "native"


def speak(checkpoint) -> np.ndarray:
    return csm_jax.load(checkpoint, "float32").generate_codes(
        TEXT,
        SPEAKER,
        sampling=csm_jax.Sampling(greedy=True),
        max_audio_length_ms=NUM_FRAMES * SMALL.frame_ms,
    )


def test_greedy_codes_equal_the_reference(native, expected):
    assert native_format.load_config(native) == SMALL
    np.testing.assert_array_equal(speak(native), expected)


def test_an_export_speaks_the_same_in_transformers_and_back(native, expected, tmp_path):
    """The chat template writes the space, and the config keeps it."""
    out = tmp_path / "hf"
    assert convert.run([f"--source={native}", f"--out={out}", "--to=hf"]) == 0
    processor = transformers.AutoProcessor.from_pretrained(out)
    model = transformers.CsmForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    assert model.generation_config.max_new_tokens == 1125  # 90 s
    turn = {"role": str(SPEAKER), "content": [{"type": "text", "text": TEXT}]}
    inputs = processor.apply_chat_template([turn], tokenize=True, return_dict=True)
    greedy = {"do_sample": False, "depth_decoder_do_sample": False}
    theirs = model.generate(**inputs, **greedy, max_new_tokens=NUM_FRAMES)[0].numpy()
    np.testing.assert_array_equal(theirs, expected)

    # What transformers saves again, as after fine-tuning there, is read with the same prompt.
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    assert convert.run([f"--source={tmp_path / 'again'}", f"--out={tmp_path / 'back'}"]) == 0
    config = native_format.load_config(tmp_path / "back")
    assert (config.space_after_speaker, config.default_max_audio_length_ms) == (True, 90_000)
    np.testing.assert_array_equal(speak(tmp_path / "back"), expected)
