"""Configs to and from their JSON forms, and the sizes of the released model."""

import dataclasses
import json
import math

import numpy as np
import pytest

from csm_jax.checkpoints import native_format
from csm_jax.config import CSMConfig, RopeScaling, TextTokenIds, csm_1b, miso_8b, tiny
from csm_jax.convert import configs
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.errors import CheckpointError
from csm_jax.model.layers import rope_frequencies

ODD = dataclasses.replace(
    tiny(),
    backbone=dataclasses.replace(tiny().backbone, rope_scaling=None, rope_theta=1234.5),
    text_token_ids=TextTokenIds(bos=7, eos=8, audio=1, audio_eos=2),
)
# The sizes in the `config.json` of `sesame/csm-1b`, with the older form of RoPE.
PUBLISHED_ROPE = {
    "factor": 32.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 1024,
    "rope_type": "llama3",
}
PUBLISHED_DEPTH_ROPE = PUBLISHED_ROPE | {
    "low_freq_factor": 0.001953125,
    "high_freq_factor": 0.0078125,
    "original_max_position_embeddings": 16,
}
PUBLISHED = {
    "model_type": "csm",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "rope_scaling": PUBLISHED_ROPE,
    "num_codebooks": 32,
    "vocab_size": 2051,
    "text_vocab_size": 128256,
    "tie_codebooks_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": None,
    "audio_token_id": 128002,
    "audio_eos_token_id": 128003,
    "depth_decoder_config": {
        "hidden_size": 1024,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 33,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000,
        "rope_scaling": PUBLISHED_DEPTH_ROPE,
    },
    "codec_config": {"model_type": "mimi", "hidden_size": 512, "_frame_rate": 12.5},
}


def published(**changes) -> dict:
    return json.loads(json.dumps(PUBLISHED | changes))


def without_scaling(config: CSMConfig) -> CSMConfig:
    """The config without RoPE scaling, whose different numbers may have equal effect."""
    stacks = {
        name: dataclasses.replace(getattr(config, name), rope_scaling=None)
        for name in ("backbone", "depth_decoder")
    }
    return dataclasses.replace(config, **stacks)


def frequencies(config) -> np.ndarray:
    return rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def assert_equivalent(got: CSMConfig, want: CSMConfig) -> None:
    assert without_scaling(got) == without_scaling(want)
    for stack in ("backbone", "depth_decoder"):
        ours, theirs = frequencies(getattr(got, stack)), frequencies(getattr(want, stack))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=stack)


@pytest.mark.parametrize("config", [csm_1b(), miso_8b(), tiny(), ODD])
def test_configs_are_equivalent_after_writing_and_reading(config):
    assert CSMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    back = configs.csm_from_huggingface(json.loads(json.dumps(configs.csm_to_huggingface(config))))
    # Hugging Face's form has no field for the text EOS: it is the id after BOS, as in Llama 3.
    assert_equivalent(back, config)


def test_the_released_model_has_its_published_size():
    """CSM has 1 552 791 552 parameters without the codec. Mimi has 79 308 609 trained weights, and
    the entries of 32 codebooks, which are buffers in torch."""
    shapes = native_format.flatten(native_format.param_shapes(csm_1b()))
    sizes = {path: math.prod(shape.shape) for path, shape in shapes.items()}
    assert sum(n for path, n in sizes.items() if path.startswith("csm/")) == 1_552_791_552
    codebooks = sum(n for path, n in sizes.items() if "/codebooks/" in path)
    assert codebooks == 32 * 2048 * 256
    codec = sum(n for path, n in sizes.items() if path.startswith("codec/"))
    assert codec - codebooks == 79_308_609


def test_mimi_has_the_size_of_the_reference():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.MimiModel(transformers.MimiConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 79_308_609


def test_the_published_config_gives_csm_1b():
    assert_equivalent(configs.csm_from_huggingface(published()), csm_1b())


def test_the_published_rope_numbers_are_read_unchanged():
    config = configs.csm_from_huggingface(published())
    assert config.backbone.rope_scaling == RopeScaling(32.0, 0.125, 0.5, 1024)
    assert config.depth_decoder.rope_scaling == RopeScaling(32.0, 0.001953125, 0.0078125, 16)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_published_rope_numbers_give_metas_frequencies(head_dim):
    meta = RopeScaling(32.0, 1.0, 4.0, 8192)
    scaled = rope_frequencies(head_dim, 500_000.0, meta)
    assert (scaled < rope_frequencies(head_dim, 500_000.0)).any(), "the scaling does nothing"
    for same in (RopeScaling(32.0, 0.125, 0.5, 1024), RopeScaling(32.0, 2**-9, 2**-7, 16)):
        got = rope_frequencies(head_dim, 500_000.0, same)
        np.testing.assert_allclose(got, scaled, rtol=1e-6)


def test_the_newer_form_of_rope_is_read():
    values = published(rope_parameters=PUBLISHED_ROPE | {"rope_theta": 10_000.0})
    del values["rope_scaling"], values["rope_theta"]
    backbone = configs.csm_from_huggingface(values).backbone
    assert backbone.rope_theta == 10_000.0
    assert backbone.rope_scaling == RopeScaling(32.0, 0.125, 0.5, 1024)


def test_the_oldest_form_of_rope_is_read():
    kind = {"type": "llama3"} | {k: v for k, v in PUBLISHED_ROPE.items() if k != "rope_type"}
    backbone = configs.csm_from_huggingface(published(rope_scaling=kind)).backbone
    assert backbone.rope_scaling == RopeScaling(32.0, 0.125, 0.5, 1024)


@pytest.mark.parametrize("rope", [None, {"rope_type": "default"}])
def test_missing_rope_scaling_gives_plain_rope(rope):
    backbone = configs.csm_from_huggingface(published(rope_scaling=rope, rope_theta=777.0)).backbone
    assert (backbone.rope_scaling, backbone.rope_theta) == (None, 777.0)


def test_transformers_reads_written_configs():
    transformers = pytest.importorskip("transformers")
    for config in (csm_1b(), miso_8b(), tiny()):
        theirs = transformers.CsmConfig(**configs.csm_to_huggingface(config))
        assert theirs.depth_decoder_config.num_hidden_layers == config.depth_decoder.num_layers
        assert theirs.codec_config.upsampling_ratios == [*reversed(config.codec.ratios)]
        assert_equivalent(configs.csm_from_huggingface(theirs.to_dict()), config)


def test_flavors_are_read():
    values = {
        "backbone_flavor": "llama-1B",
        "decoder_flavor": "llama-100M",
        "text_vocab_size": 128_256,
        "audio_vocab_size": 2051,
        "audio_num_codebooks": 32,
    }
    assert configs.csm_from_flavors(values) == csm_1b()
    with pytest.raises(CheckpointError, match=r"flavor llama-7B.*llama-1B.*--config"):
        configs.csm_from_flavors(values | {"backbone_flavor": "llama-7B"})
    del values["audio_num_codebooks"]
    with pytest.raises(CheckpointError, match="lacks audio_num_codebooks"):
        configs.csm_from_flavors(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True; only False is supported"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"tie_codebooks_embeddings": False}, "tie_codebooks_embeddings"),
        ({"rope_scaling": PUBLISHED_ROPE | {"rope_type": "yarn"}}, "type yarn; default and llama3"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "lacks factor"),
        ({"num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        ({"num_codebooks": 33}, "num_codebooks 33 is outside 2..32"),
        ({"vocab_size": 2000}, "audio_vocab_size 2000 is smaller"),
        ({"codec_config": {"use_causal_conv": False}}, "use_causal_conv"),
        ({"codec_config": {"num_key_value_heads": 2}}, "num_key_value_heads"),
        ({"codec_config": {"vector_quantization_hidden_dimension": 9}}, "vector_quantization"),
    ],
)
def test_unsupported_settings_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        configs.csm_from_huggingface(published(**changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["backbone"].pop("num_layers"),
            r"LlamaConfig.*missing fields \['num_layers'\]",
        ),
        (lambda v: v["codec"].update(window=3), r"MimiConfig: unknown fields \['window'\]"),
        (lambda v: v.pop("codec"), "no section for MimiConfig"),
        (lambda v: v.pop("backbone"), "no section for LlamaConfig"),
        (lambda v: v.clear(), "no section for LlamaConfig"),
    ],
)
def test_a_damaged_native_config_is_refused(change, message):
    values = tiny().to_dict()
    change(values)
    with pytest.raises(CheckpointError, match=message):
        CSMConfig.from_dict(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "stack of unknown sizes .3 layers of 48.*, and no config.json that tells its heads"),
        ("{", "config.json cannot be read"),
        ('{"a":' * 10_000, "config.json cannot be read"),
        ("[]", "not a JSON object"),
        (
            '{"audio_vocab_size": 35}',
            "tells its heads: give the sizes with --config",
        ),
    ],
)
def test_a_damaged_published_config_is_refused(sesame, codec, tmp_path, content, message):
    (tmp_path / "model.safetensors").symlink_to(sesame / "model.safetensors")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, codec)
