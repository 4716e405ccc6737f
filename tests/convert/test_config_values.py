"""A published config.json is checked as strictly as the tensors: null, types, RoPE."""

import json

import pytest
from fixtures import CONFIG

from csm_jax.config import CSMConfig, RopeScaling, read_json, tiny
from csm_jax.convert import configs
from csm_jax.errors import CheckpointError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 32.0,
    "low_freq_factor": 0.125,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 512,
}


def published(**changes) -> dict:
    return json.loads(json.dumps(configs.csm_to_huggingface(CONFIG) | changes))


def read(**changes) -> CSMConfig:
    return configs.csm_from_huggingface(published(**changes))


def test_null_is_the_default():
    """Every value that can be left out can be null, with the same result."""
    for name in published():
        without = published()
        del without[name]
        results = []
        for values in (without, published(**{name: None})):
            try:
                results.append(configs.csm_from_huggingface(values))
            except CheckpointError as error:  # the default does not fit the other sizes
                results.append(str(error))
        assert results[0] == results[1], name


@pytest.mark.parametrize("section", ["codec_config", "depth_decoder_config"])
def test_null_is_the_default_in_sections(section):
    whole = published()[section]
    for name in whole:
        without = {key: value for key, value in whole.items() if key != name}
        results = []
        for values in (without, whole | {name: None}):
            try:
                results.append(read(**{section: values}))
            except CheckpointError as error:
                results.append(str(error))
        assert results[0] == results[1], name


@pytest.mark.parametrize("wrong", ["48", 48.5, [48], {"a": 48}, True, -48, 0])
def test_a_wrong_size_is_one_line_that_names_it(wrong):
    sizes = [name for name, value in published().items() if type(value) is int]
    sizes = [name for name in sizes if "token_id" not in name]
    assert "hidden_size" in sizes
    for name in sizes:
        with pytest.raises(CheckpointError, match=f"{name} is .*, but must be a whole") as caught:
            read(**{name: wrong})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token_id": "256"}, "bos_token_id is '256'"),
        ({"eos_token_id": []}, r"eos_token_id is \[\]"),
        ({"audio_token_id": -1}, "audio_token_id is -1"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"codec_config": "mimi"}, "codec_config='mimi', but it must be an object"),
        ({"depth_decoder_config": [1]}, "depth_decoder_config=.*must be an object"),
        ({"depth_decoder_config": {"hidden_size": "36"}}, "depth_decoder_config.hidden_size is"),
        ({"codec_config": {"upsampling_ratios": 8}}, "codec_config.upsampling_ratios is 8"),
        ({"codec_config": {"frame_rate": 12.4}}, "frame_rate=12.4, which is no whole fraction"),
        ({"codec_config": {"frame_rate": 0}}, "frame_rate is 0"),
        ({"codec_config": {"rope_parameters": LLAMA3}}, "scaled RoPE in the codec"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"quantization_config": {"load_in_4bit": True}}, "its weights are quantized"),
        ({"codebook_eos_token_id": 5}, "codebook_eos_token_id=5; only 0"),
        ({"attention_bias": 0}, "attention_bias=0; only False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only 1.0"),
    ],
)
def test_wrong_values_are_one_line(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


def test_an_id_of_zero_is_an_id():
    assert read(eos_token_id=0).text_token_ids.eos == 0
    assert read(eos_token_id=[5, 6]).text_token_ids.eos == 5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_in_any_unicode_encoding_is_read(tmp_path, encoding):
    (tmp_path / "config.json").write_text('{"a": "ü"}', encoding)
    assert read_json(tmp_path / "config.json") == {"a": "ü"}


# --- RoPE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_rope_that_is_nested_by_layer_types_is_read(layer_type):
    backbone = read(rope_parameters={layer_type: LLAMA3}).backbone
    assert backbone == read(rope_parameters=LLAMA3).backbone
    assert backbone.rope_scaling == RopeScaling(32.0, 0.125, 0.5, 512)
    assert backbone.rope_theta == 1000.0


def test_nested_rope_of_the_depth_decoder_and_the_codec_is_read():
    depth = published()["depth_decoder_config"] | {"rope_parameters": {"full_attention": LLAMA3}}
    assert read(depth_decoder_config=depth).depth_decoder.rope_theta == 1000.0
    plain = {"sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}
    codec = published()["codec_config"] | {"rope_parameters": plain}
    assert read(codec_config=codec).codec.rope_theta == 77.0


def test_the_same_rope_in_both_forms_is_read():
    old = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    twice = read(rope_parameters=LLAMA3, rope_scaling=old, rope_theta=1000.0)
    assert twice.backbone == read(rope_parameters=LLAMA3).backbone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": LLAMA3 | {"mscale": 1.0}}, r"rope_parameters\.mscale, which is not"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"factor, which is not"),
        ({"rope_parameters": {"full_attention": LLAMA3 | {"beta_fast": 3}}}, "beta_fast"),
        ({"rope_parameters": {"full_attention": LLAMA3, "other": LLAMA3}}, r"\.other, which"),
        ({"rope_parameters": {"global": LLAMA3}}, r"\.global, which is not supported"),
        ({"rope_parameters": LLAMA3 | {"factor": "32"}}, "factor is '32'"),
        ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 0.125}}, "not below"),
        ({"rope_parameters": [LLAMA3]}, "must be an object"),
        ({"rope_parameters": LLAMA3, "rope_scaling": {"type": "default"}}, "several different"),
        (
            {
                "rope_parameters": {
                    "full_attention": LLAMA3,
                    "sliding_attention": LLAMA3 | {"rope_theta": 5.0},
                }
            },
            "several different settings of RoPE",
        ),
    ],
)
def test_rope_that_is_not_understood_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


# --- Native configs -----------------------------------------------------------------------------


def test_wrong_types_in_a_native_config_are_one_line():
    """Of every field of every section."""
    for section, fields in tiny().to_dict().items():
        names = fields if isinstance(fields, dict) else [section]
        for name in names:
            values = tiny().to_dict()
            where = values[section] if isinstance(fields, dict) else values
            where[name] = "3"
            with pytest.raises(CheckpointError, match=r"is '3', but must be|no section"):
                CSMConfig.from_dict(values)


@pytest.mark.parametrize("values", ["text", [1], None, {"backbone": "text"}])
def test_a_native_config_that_is_no_object_is_one_line(values):
    with pytest.raises(CheckpointError, match=r"must be an object|no section"):
        CSMConfig.from_dict(values)
