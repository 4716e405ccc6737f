"""The known sizes of the family, found by shapes or by the names in a config."""

import dataclasses
import json

import fixtures
import jax
import numpy as np
import pytest
from fixtures import CONFIG, assert_same_params, loaded, params

from csm_jax.checkpoints import native_format
from csm_jax.config import csm_1b, miso_8b
from csm_jax.convert import __main__ as convert
from csm_jax.convert import configs
from csm_jax.convert.flavors import csm_from_shapes
from csm_jax.errors import CheckpointError

# Layers, dimension, query heads, kv heads, dimension of a head, MLP: as `models.py` of
# SesameAILabs/csm and of MisoLabsAI/MisoTTS have them.
SIZES = {
    "llama-1B": (16, 2048, 32, 8, 64, 8192),
    "llama-100M": (4, 1024, 8, 2, 128, 8192),
    "llama-8B": (32, 4096, 32, 8, 128, 14_336),
    "llama-300M": (8, 1536, 24, 6, 64, 6912),
    "llama-7B": (32, 4096, 32, 32, 128, 11_008),
}


def shapes_of(backbone: str, decoder: str, codebooks: int = 32) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes that tell the sizes of a checkpoint in the original layout."""
    dim, depth_dim = SIZES[backbone][1], SIZES[decoder][1]
    shapes = {
        "text_embeddings.weight": (128_256, dim),
        "codebook0_head.weight": (2051, dim),
        "audio_head": (codebooks - 1, depth_dim, 2051),
    }
    for stack, flavor in (("backbone", backbone), ("decoder", decoder)):
        layers, dim, heads, kv_heads, head_dim, mlp_dim = SIZES[flavor]
        for layer in range(layers):
            names = {"attn.q_proj": heads * head_dim, "attn.k_proj": kv_heads * head_dim}
            for name, size in (names | {"mlp.w1": mlp_dim}).items():
                shapes[f"{stack}.layers.{layer}.{name}.weight"] = (size, dim)
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}


def test_known_models_are_found_by_their_shapes():
    assert csm_from_shapes("a", shapes_of("llama-1B", "llama-100M")) == csm_1b()
    assert csm_from_shapes("a", shapes_of("llama-8B", "llama-300M")) == miso_8b()


@pytest.mark.parametrize("backbone", ["llama-1B", "llama-8B"])
def test_flavors_can_be_combined_and_the_prompt_is_the_backbones(backbone):
    config = csm_from_shapes("a", shapes_of(backbone, "llama-100M", codebooks=16))
    assert config.depth_decoder == csm_1b().depth_decoder
    assert config.num_codebooks == 16
    assert config.space_after_speaker == (backbone == "llama-8B")
    named = {
        "backbone_flavor": backbone,
        "decoder_flavor": "llama-100M",
        "text_vocab_size": 128_256,
        "audio_vocab_size": 2051,
        "audio_num_codebooks": 16,
    }
    assert configs.csm_from_published(named) == config


def test_unknown_shapes_are_an_error_that_names_the_flag():
    with pytest.raises(CheckpointError, match=r"32 layers of 4096, .*MLP 11008.*--config"):
        csm_from_shapes("a", shapes_of("llama-7B", "llama-100M"))
    shapes = shapes_of("llama-8B", "llama-300M")
    del shapes["audio_head"]
    with pytest.raises(CheckpointError, match="lacks tensor audio_head"):
        csm_from_shapes("a", shapes)


@pytest.mark.parametrize("marked", [False, True])
def test_transformers_config_of_a_miso_has_its_prompt(marked):
    """By a field that transformers keeps, or, if another program wrote it, by its sizes."""
    values = json.loads(json.dumps(configs.csm_to_huggingface(miso_8b())))
    for name in () if marked else ("space_after_speaker", "default_max_audio_length_ms"):
        del values[name]
    config = configs.csm_from_huggingface(values)
    assert (config.space_after_speaker, config.default_max_audio_length_ms) == (True, 90_000)
    values["space_after_speaker"] = False
    assert not configs.csm_from_huggingface(values).space_after_speaker
    with pytest.raises(CheckpointError, match="space_after_speaker is 1, but must be true or fal"):
        configs.csm_from_huggingface(values | {"space_after_speaker": 1})


def test_numbers_go_before_the_name_of_a_flavor():
    """Marvis' config has both, and names of the original layout for the audio vocabulary."""
    values = configs.csm_to_huggingface(CONFIG) | {
        "backbone_flavor": "llama-250M",
        "decoder_flavor": "llama-60M",
        "audio_vocab_size": 35,
        "audio_num_codebooks": 7,
    }
    del values["vocab_size"], values["num_codebooks"]
    config = configs.csm_from_published(values)
    assert (config.audio_vocab_size, config.num_codebooks) == (35, 7)
    assert config.backbone.num_layers == CONFIG.backbone.num_layers


@pytest.mark.parametrize("form", ["native", "fields", "transformers"])
def test_sizes_are_given_in_any_form(tmp_path, form):
    sesame = fixtures.write_sesame(tmp_path / "sesame")
    (sesame / "config.json").unlink()
    codec = fixtures.write_codec(tmp_path / "codec", "huggingface_codec")
    config = dataclasses.replace(CONFIG, space_after_speaker=True)
    fields = json.loads(json.dumps(config.to_dict()))
    forms = {
        "native": {"format": "csm-jax", "config": fields},
        "fields": fields,
        "transformers": configs.csm_to_huggingface(config),
    }
    (tmp_path / "sizes.json").write_text(json.dumps(forms[form]))
    flags = [f"--source={sesame}", f"--codec={codec}", f"--config={tmp_path / 'sizes.json'}"]
    assert convert.run([*flags, f"--out={tmp_path / 'native'}"]) == 0
    assert native_format.load_config(tmp_path / "native").space_after_speaker
    assert_same_params(loaded(tmp_path / "native"), params())
