"""Adapters of the real PEFT: what its options mean, and which of its files are refused."""

import dataclasses
import json
import logging

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import fixtures
import peft
import torch
from safetensors.torch import load_file, save_file

import csm_jax
import oracles
from csm_jax.checkpoints import native_format, peft_files, peft_options
from csm_jax.convert import csm
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.errors import CheckpointError
from csm_jax.loading import find_adapters, open_source
from csm_jax.model.precision import FLOAT32

CONFIG = csm_jax.tiny()
TABLE = csm.huggingface_table(CONFIG.backbone, CONFIG.depth_decoder)
# The list of public fine-tuning notebooks.
SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."
SAMPLE = f"{PREFIX}backbone_model.layers.0.self_attn.q_proj"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """All parameters of the model that adapters are trained on, by path."""
    directory = tmp_path_factory.mktemp("hf") / "model"
    oracles.save_hf(oracles.hf_model(CONFIG, seed=3), directory)
    params = fixtures.params_of(open_checkpoint(directory), FLOAT32)
    return {path: np.asarray(a) for path, a in native_format.flatten(params).items()}


def trained(directory, is_trained=lambda name: "codec_model" not in name, dtype=None, **options):
    """Saves PEFT adapters of the model, of which some get random weights. Returns PEFT's model."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": SUFFIXES} | options
    model = peft.get_peft_model(oracles.hf_model(CONFIG, seed=3), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and is_trained(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    if dtype is not None:
        file = directory / peft_files.WEIGHTS
        save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file)
    return model


def assert_equal_to_peft(base, directory, model, rtol=1e-5, atol=1e-6):
    """The parameters with merged adapters are those that PEFT itself merges."""
    ours = dict(peft_files.merge_files(base.items(), CONFIG, directory, is_int8=False))
    merged = model.merge_and_unload()
    for name, tensor in fixtures.written(TABLE, fixtures.section("csm/", ours)).items():
        theirs = merged.get_parameter(name).detach().numpy()
        np.testing.assert_allclose(tensor, theirs, rtol=rtol, atol=atol, err_msg=name)
    for path in base:
        if path.startswith("codec/"):
            np.testing.assert_array_equal(ours[path], base[path], path)


def change_config(directory, **changes):
    file = directory / peft_files.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_plain(directory, **options):
    """One small adapter with a config of these options."""
    directory.mkdir(exist_ok=True)
    width, out = CONFIG.backbone.embed_dim, CONFIG.backbone.num_heads * CONFIG.backbone.head_dim
    halves = {"A": torch.ones(2, width), "B": torch.ones(out, 2)}
    tensors = {f"{SAMPLE}.lora_{half}.weight": tensor for half, tensor in halves.items()}
    save_file(tensors, directory / peft_files.WEIGHTS)
    (directory / peft_files.CONFIG).write_text(json.dumps(PLAIN | options))
    return directory


def read(directory):
    return peft_files.read_adapters(directory, CONFIG)


def test_zero_updates_of_the_codec_are_left_out_with_a_notice(base, tmp_path, caplog):
    model = trained(tmp_path)
    names = load_file(tmp_path / peft_files.WEIGHTS)
    codec = {name for name in names if "codec_model" in name}
    assert codec, "PEFT has adapted no module of the codec"
    with caplog.at_level(logging.WARNING, "csm_jax"):
        assert_equal_to_peft(base, tmp_path, model)
    (record,) = caplog.records
    assert f"adapters of {len(codec) // 2} modules such as codec_model." in record.getMessage()


def test_zero_updates_of_embeddings_are_left_out(tmp_path, caplog):
    trained(
        tmp_path,
        lambda name: "q_proj" in name and "codec" not in name,
        target_modules=["q_proj", "embed_text_tokens"],
    )
    names = load_file(tmp_path / peft_files.WEIGHTS)
    assert any("lora_embedding_A" in name for name in names)
    adapters, _ = read(tmp_path)
    assert {path.rpartition("/")[2] for path in adapters} == {"q"}


def test_zero_updates_of_convolutions_are_left_out(base, tmp_path):
    model = trained(tmp_path, target_modules=["q_proj", "downsample.conv"])
    assert any(t.ndim == 3 for t in load_file(tmp_path / peft_files.WEIGHTS).values())
    assert_equal_to_peft(base, tmp_path, model)


@pytest.mark.parametrize("part", ["codec_model", "embed_text_tokens"])
def test_other_updates_that_are_not_zero_are_refused_by_name(tmp_path, part):
    trained(
        tmp_path,
        target_modules=[*SUFFIXES, "embed_text_tokens"],
        is_trained=lambda name: part in name or "backbone" in name,
    )
    with pytest.raises(CheckpointError, match=rf"changes {part}.*merge_and_unload"):
        read(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_of_a_changed_base_are_refused_until_they_are_converted(base, tmp_path, init):
    """PEFT's conversion is relative to the adapters at the start, and doubles their rank."""
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": init}
    pattern = r"backbone_model\.layers\.\d+\.self_attn\.[qk]_proj"
    settings = peft.LoraConfig(**options, target_modules=pattern)
    model = peft.get_peft_model(oracles.hf_model(CONFIG, seed=3), settings)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "mutated")
    with pytest.raises(CheckpointError, match=f"{init}.*path_initial_model_for_weight_conversion"):
        read(tmp_path / "mutated")
    start = str(tmp_path / "start")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=start)
    assert_equal_to_peft(base, tmp_path / "plain", model, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga", "a new one", 3])
def test_other_inits_that_change_the_base_are_refused(tmp_path, init):
    with pytest.raises(CheckpointError, match="init_lora_weights"):
        read(write_plain(tmp_path, init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_inits_that_leave_the_base_alone_are_read(base, tmp_path, init):
    pattern = r"backbone_model\.layers\.\d+\.self_attn\.[qk]_proj"
    model = trained(tmp_path, init_lora_weights=init, target_modules=pattern)
    assert_equal_to_peft(base, tmp_path, model)


def test_the_default_options_of_peft_are_read(tmp_path):
    default = json.loads(json.dumps(peft.LoraConfig(r=2, lora_alpha=4).to_dict(), default=list))
    adapters, scale = read(write_plain(tmp_path, **default))
    assert len(adapters) == 1
    assert scale == 2.0


def test_every_option_of_peft_is_known_or_refused():
    known = {*peft_options._READ, *peft_options._WITHOUT_EFFECT, "init_lora_weights", "bias"}
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert known <= options
    for name in options - known:
        with pytest.raises(CheckpointError, match=f"x has {name}, which is not supported"):
            peft_options.parse_options(PLAIN | {name: [1]}, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [0]}, "trainable_token_indices"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"an_option_of_next_year": {"a": 1}}, "an_option_of_next_year"),
        ({"bias": "all"}, "bias=all"),
        ({"peft_type": "ADALORA"}, "type ADALORA; only LORA"),
        ({"peft_type": None}, "has no peft_type"),
        ({"r": "2"}, "r is '2'"),
        ({"r": True}, "r is True"),
        ({"r": 3}, "rank is 3"),
        ({"rank_pattern": {"q_proj": 4}}, "rank is 4"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"rank_pattern": [1]}, "must be an object"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
    ],
)
def test_options_that_are_not_understood_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read(write_plain(tmp_path, **changes))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_of_single_modules_are_read(base, tmp_path, use_rslora):
    model = trained(
        tmp_path,
        use_rslora=use_rslora,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        alpha_pattern={"depth_decoder.*v_proj": 1, "q_proj": 5},
    )
    assert_equal_to_peft(base, tmp_path, model)


def test_bfloat16_adapters_are_read(base, tmp_path):
    model = trained(tmp_path, dtype=torch.bfloat16)
    assert_equal_to_peft(base, tmp_path, model, rtol=0.05, atol=5e-3)


def test_adapters_in_a_pickle_are_read(base, tmp_path):
    model = trained(tmp_path)
    tensors = load_file(tmp_path / peft_files.WEIGHTS)
    torch.save(tensors, tmp_path / peft_files.TORCH_WEIGHTS)
    (tmp_path / peft_files.WEIGHTS).unlink()
    assert_equal_to_peft(base, tmp_path, model)


def test_adapters_of_a_compiled_model_are_read(base, tmp_path):
    """torch.compile puts `_orig_mod` into the names."""
    model = trained(tmp_path)
    file = tmp_path / peft_files.WEIGHTS
    prefix = "base_model.model."
    tensors = load_file(file)
    save_file({n.replace(prefix, f"{prefix}_orig_mod."): t for n, t in tensors.items()}, file)
    assert_equal_to_peft(base, tmp_path, model)


@pytest.mark.parametrize("adapter", ["default", "voice"])
def test_names_of_adapters_inside_of_names_are_read(base, tmp_path, adapter):
    """As in a state dict of PEFT's model itself, which accelerate and torch save."""
    model = trained(tmp_path)
    assert f"{SAMPLE}.lora_A.default.weight" in model.state_dict()
    file = tmp_path / peft_files.WEIGHTS
    names = load_file(file)
    save_file({n.replace(".weight", f".{adapter}.weight"): t for n, t in names.items()}, file)
    assert_equal_to_peft(base, tmp_path, model)


def test_several_adapters_in_a_file_are_refused(tmp_path):
    file = write_plain(tmp_path) / peft_files.WEIGHTS
    names = load_file(file)
    others = {n.replace(".weight", ".other.weight"): t.clone() for n, t in names.items()}
    save_file(names | others, file)
    with pytest.raises(CheckpointError, match=f"several adapters of {SAMPLE[len(PREFIX) :]}"):
        read(tmp_path)


def test_adapters_of_other_libraries_are_refused(tmp_path):
    """The config of mlx-lm."""
    write_plain(tmp_path, peft_type=None, fine_tune_type="lora", lora_parameters={"rank": 8})
    with pytest.raises(CheckpointError, match="no peft_type: only adapters of PEFT"):
        read(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path):
    write_plain(tmp_path)
    tensors = load_file(tmp_path / peft_files.WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, tmp_path / peft_files.WEIGHTS)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        read(tmp_path)


def test_a_base_with_another_head_is_refused(base, tmp_path):
    """PEFT saves the head that it adapts next to its adapters."""
    model = trained(tmp_path, target_modules=["lm_head"], is_trained=lambda name: True)
    name = "base_model.model.lm_head.base_layer.weight"
    assert name in load_file(tmp_path / peft_files.WEIGHTS)
    assert_equal_to_peft(base, tmp_path, model)
    path = "csm/codebook0_head/weight"
    changed = base | {path: base[path] + 0.1}
    with pytest.raises(CheckpointError, match="another codebook0_head"):
        dict(peft_files.merge_files(changed.items(), CONFIG, tmp_path, is_int8=False))


def test_adapters_as_a_checkpoint_are_an_error_that_names_the_flag(tmp_path):
    write_plain(tmp_path, base_model_name_or_path="sesame/csm-1b")
    with pytest.raises(CheckpointError, match=r"adapters of sesame/csm-1b and no.*--adapters"):
        csm_jax.load(tmp_path)


def test_a_directory_of_a_run_as_a_checkpoint_is_an_error_that_names_its_adapters(tmp_path):
    write_plain(tmp_path / "checkpoint-500", base_model_name_or_path="sesame/csm-1b")
    with pytest.raises(CheckpointError, match=r"--adapters=.*/checkpoint-500"):
        csm_jax.load(tmp_path)


@pytest.mark.parametrize(
    ("base", "is_told"),
    [("sesame/csm-1b", True), ("someone/else@v2", True), ("random:tiny", False), (None, False)],
)
def test_adapters_of_another_model_are_told(tmp_path, caplog, base, is_told):
    write_plain(tmp_path, base_model_name_or_path=base)
    with caplog.at_level(logging.WARNING, "csm_jax"):
        open_source("random:tiny", tmp_path)
    told = f"{tmp_path}: the adapters are of {base}, and are added to random:tiny"
    assert [record.getMessage() for record in caplog.records] == [told] * is_told


def test_a_checkpoint_as_adapters_is_an_error_that_names_the_way(native, tmp_path):
    with pytest.raises(CheckpointError, match="whole model and no adapters"):
        read(native)
    write_plain(tmp_path / "adapters")
    with pytest.raises(CheckpointError, match=f"name {tmp_path / 'adapters'}"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="is no directory"):
        read(find_adapters("nowhere"))
