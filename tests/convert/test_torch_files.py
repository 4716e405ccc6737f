"""State dicts of torch: unwrapped, without the prefixes of wrappers, and never run as code."""

import json
import shutil

import fixtures
import pytest
from fixtures import assert_same_params, params, tensors_of
from safetensors.numpy import save_file

from csm_jax.checkpoints.torch_files import plain_names
from csm_jax.convert.layouts import open_checkpoint
from csm_jax.errors import CheckpointError

torch = pytest.importorskip("torch")


def torch_tensors():
    return {name: torch.tensor(t) for name, t in fixtures.huggingface_tensors().items()}


def write_torch(directory, content, name="model.pt", **options):
    fixtures.write_config(directory)
    torch.save(content, directory / name, **options)
    return directory


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict", "module"])
def test_state_dicts_are_unwrapped(tmp_path, key):
    content = {key: torch_tensors(), "optimizer_state_dict": {"lr": 1.0}, "epoch": 3}
    assert_same_params(tensors_of(write_torch(tmp_path, content)), params())


def test_nested_wrappers_are_unwrapped(tmp_path):
    content = {"state_dict": {"model": torch_tensors(), "step": 1}, "epoch": 3}
    assert_same_params(tensors_of(write_torch(tmp_path, content)), params())


def test_several_state_dicts_in_a_file_are_named(tmp_path):
    tensors = torch_tensors()
    write_torch(tmp_path, {"model": tensors, "state_dict": tensors, "epoch": 3})
    with pytest.raises(CheckpointError, match="several state dicts, model and state_dict"):
        open_checkpoint(tmp_path)


def test_what_a_file_holds_instead_is_named(tmp_path):
    write_torch(tmp_path, {"weights": torch_tensors(), "epoch": 3})
    with pytest.raises(CheckpointError, match=r"weights, epoch are none, and none of model, "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix):
    content = {prefix + name: tensor for name, tensor in torch_tensors().items()}
    assert_same_params(tensors_of(write_torch(tmp_path, content)), params())


def test_prefixes_inside_of_names_are_removed_from_safetensors(tmp_path):
    def wrapped(name):
        return name.replace("self_attn.", "_orig_mod.self_attn._checkpoint_wrapped_module.")

    tensors = {wrapped(name): t for name, t in fixtures.huggingface_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    fixtures.write_config(tmp_path)
    assert_same_params(tensors_of(tmp_path), params())


def test_the_prefixes_are_those_of_torch():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    wrapped = torch.nn.DataParallel(torch.compile(module))
    assert wrapped.state_dict().keys() != module.state_dict().keys()
    assert plain_names(wrapped.state_dict(), "x").keys() == module.state_dict().keys()


def test_a_name_with_and_without_prefix_is_refused(tmp_path):
    tensors = fixtures.huggingface_tensors()
    tensors["_orig_mod.lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds lm_head\.weight twice"):
        open_checkpoint(tmp_path)


def test_pytorch_model_bin_is_read(tmp_path):
    write_torch(tmp_path, torch_tensors(), "pytorch_model.bin")
    write_torch(tmp_path, {"a": 1}, "training_args.bin")
    assert_same_params(tensors_of(tmp_path), params())


def test_parts_of_pytorch_model_bin_are_read(tmp_path):
    tensors = torch_tensors()
    weight_map = {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        own = {key: tensors[key] for key in sorted(tensors)[i::2]}
        write_torch(tmp_path, own, file)
        weight_map |= dict.fromkeys(own, file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same_params(tensors_of(tmp_path), params())


def test_files_of_old_torch_are_read(tmp_path):
    write_torch(tmp_path, torch_tensors(), _use_new_zipfile_serialization=False)
    assert_same_params(tensors_of(tmp_path), params())


def test_several_files_of_torch_are_listed(tmp_path):
    tensors = torch_tensors()
    write_torch(tmp_path, {k: t + 1 for k, t in tensors.items()}, "model_1000.pt")
    write_torch(tmp_path, tensors, "model_final.pt")
    write_torch(tmp_path, {"lr": 1.0}, "state.pt")
    with pytest.raises(CheckpointError, match=r"several checkpoints, model_1000\.pt, model_final"):
        open_checkpoint(tmp_path)
    shutil.move(tmp_path / "model_final.pt", tmp_path / "ckpt.pt")
    assert_same_params(tensors_of(tmp_path), params())


def test_a_damaged_file_beside_another_is_not_passed_over(tmp_path):
    write_torch(tmp_path, torch_tensors(), "model_1000.pt")
    (tmp_path / "model_final.pt").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match=r"model_final\.pt cannot be read"):
        open_checkpoint(tmp_path)


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    write_torch(tmp_path, {"model": torch_tensors(), "args": Code()}, "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"without running code, because it holds \w+\.open: save"
    ):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()
