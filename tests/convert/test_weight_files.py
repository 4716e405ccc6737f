"""Which files of a directory are its checkpoint: as transformers decides, or else one of one."""

import json

import fixtures
import numpy as np
import pytest
from fixtures import assert_same_params, params, tensors_of
from safetensors.numpy import load_file, save_file

from csm_jax.convert.layouts import open_checkpoint
from csm_jax.convert.weight_files import candidates, choose
from csm_jax.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def other() -> dict[str, np.ndarray]:
    """A complete checkpoint with other weights, so that a test notices if it is read."""
    return {name: tensor + 1 for name, tensor in fixtures.huggingface_tensors().items()}


def write(directory, name="model.safetensors", tensors=None):
    """A directory of one file, with a config and a tokenizer."""
    directory.mkdir(exist_ok=True)
    save_file(tensors or fixtures.huggingface_tensors(), directory / name)
    fixtures.write_config(directory)
    fixtures.TOKENIZER.save(directory)
    return directory


def write_indexed(directory, parts=2):
    """A directory of numbered parts and their index."""
    directory.mkdir(exist_ok=True)
    tensors = fixtures.huggingface_tensors()
    weight_map = {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        own = {key: tensors[key] for key in sorted(tensors)[i::parts]}
        save_file(own, directory / file)
        weight_map |= dict.fromkeys(own, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    fixtures.write_config(directory)
    fixtures.TOKENIZER.save(directory)
    return directory


@pytest.mark.parametrize(
    "name",
    ["backup.safetensors", "a.safetensors", "model.fp16.safetensors", "zz.safetensors"],
)
def test_another_file_beside_model_safetensors_is_not_read(tmp_path, name):
    write(tmp_path)
    save_file(other(), tmp_path / name)
    assert_same_params(tensors_of(tmp_path), params())


def test_transformers_reads_the_same_file(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write(tmp_path)
    for name in ("backup.safetensors", "model-00003-of-00003.safetensors"):
        save_file(other(), tmp_path / name)
    model = transformers.CsmForConditionalGeneration.from_pretrained(tmp_path)
    theirs = torch.as_tensor(model.lm_head.weight).detach().numpy()
    np.testing.assert_array_equal(tensors_of(tmp_path)["csm/codebook0_head/weight"], theirs)


def test_a_part_that_the_index_does_not_name_is_not_read(tmp_path):
    write_indexed(tmp_path)
    for name in ("model-00003-of-00003.safetensors", "model-00001-of-00003.safetensors"):
        save_file(other(), tmp_path / name)
    assert_same_params(tensors_of(tmp_path), params())


def test_the_index_says_which_file_a_tensor_is_in(tmp_path):
    """A tensor that another part has too is read from the part of the index."""
    write_indexed(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    first, second = sorted(set(index.values()))
    moved = next(name for name, file in index.items() if file == first)
    tensors = load_file(tmp_path / second)
    save_file(tensors | {moved: other()[moved]}, tmp_path / second)
    assert_same_params(tensors_of(tmp_path), params())
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"both have tensor {moved}"):
        open_checkpoint(tmp_path)


def test_parts_without_an_index_are_read(tmp_path):
    write_indexed(tmp_path, parts=3)
    (tmp_path / INDEX).unlink()
    assert_same_params(tensors_of(tmp_path), params())


def test_two_sets_of_parts_without_an_index_are_ambiguous(tmp_path):
    write_indexed(tmp_path, parts=3)
    write_indexed(tmp_path, parts=2)
    assert_same_params(tensors_of(tmp_path), params())
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"several checkpoints, .*-of-00002.*-of-00003"):
        open_checkpoint(tmp_path)


def test_the_file_that_the_config_names_is_read(tmp_path):
    """`transformers_weights`, as in the published repository."""
    write(tmp_path, "mine.safetensors")
    save_file(other(), tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    named = config | {"transformers_weights": "mine.safetensors"}
    (tmp_path / "config.json").write_text(json.dumps(named))
    assert_same_params(tensors_of(tmp_path), params())
    (tmp_path / "mine.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"'mine\.safetensors'.*not there"):
        open_checkpoint(tmp_path)


def test_a_single_file_of_any_name_is_read(tmp_path):
    assert_same_params(tensors_of(write(tmp_path, "mine.safetensors")), params())


def test_several_files_of_other_names_are_listed(tmp_path):
    write(tmp_path, "one.safetensors")
    save_file(other(), tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"several checkpoints, one\.safetensors, two\.saf"):
        open_checkpoint(tmp_path)
    assert_same_params(tensors_of(tmp_path / "one.safetensors"), params())


def test_only_files_of_a_model_count(tmp_path):
    """The codec of the original layout often lies beside the model, and so do training states."""
    write(tmp_path, "mine.safetensors")
    save_file(fixtures.layout("kyutai_codec"), tmp_path / "tokenizer-e351c8d8.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "optimizer.safetensors")
    (tmp_path / "rng_state_0.pth").write_bytes(b"no tensors")
    (tmp_path / "training_args.bin").write_bytes(b"no tensors")
    assert_same_params(tensors_of(tmp_path), params())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {"a": 1}}, "has no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "not beside it"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"lacks gone\.safetensors, which model\."),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "lacks tensor a"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path, content, message):
    write_indexed(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_names_alone_decide_what_is_downloaded():
    def read(name):
        return {"weight_map": {"a": "model-00001-of-00001.safetensors"}} if INDEX in name else {}

    def chosen(*names):
        return set(choose(names, read, "someone/model"))

    parts = {"model-00001-of-00001.safetensors", INDEX}
    assert chosen("config.json", "backup.safetensors", *parts) == parts
    assert chosen("model.safetensors", "backup.safetensors", *parts) == {"model.safetensors"}
    assert chosen("ckpt.pt", "model.safetensors", "old/x.safetensors") == {"model.safetensors"}
    assert chosen("only.pt", "optimizer.pt", "adapter_model.safetensors") == {"only.pt"}
    assert chosen("model.bin", "training_args.bin", "optimizer.bin") == {"model.bin"}
    assert chosen("README.md") == set()
    with pytest.raises(CheckpointError, match=r"model_1000\.pt, model_final\.pt"):
        chosen("model_1000.pt", "model_final.pt")


def test_every_file_of_weights_is_in_one_candidate():
    names = ["a.safetensors", "b-1-of-2.safetensors", "b-2-of-2.safetensors", "c.pt", "d.pt", INDEX]
    found = candidates(names, lambda name: {"weight_map": {"x": "a.safetensors", "y": "d.pt"}})
    files = [file for each in found for file in each.files]
    assert sorted(files) == sorted(names[:-1])
