"""Published layouts: every one is read as the same parameters, or refused with a reason."""

import re
import shutil
import sys
from pathlib import Path

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import CONFIG, assert_same_params, loaded, params, tensors_of
from safetensors.numpy import save_file

import csm_jax
from csm_jax.convert import __main__ as convert
from csm_jax.convert.layouts import needs_codec, open_checkpoint
from csm_jax.errors import CheckpointError

GREEDY = csm_jax.Sampling(greedy=True)


def test_the_huggingface_layout_is_read(huggingface):
    assert_same_params(tensors_of(huggingface), params())
    assert not needs_codec(huggingface)


def test_the_sesame_layout_is_read_with_either_codec(sesame, codec):
    assert_same_params(tensors_of(sesame, codec), params())
    assert_same_params(tensors_of(sesame, codec / "model.safetensors"), params())
    assert needs_codec(sesame)


def test_of_two_layouts_in_a_directory_huggingface_is_read(mixed, tmp_path):
    """The layers of the Hugging Face checkpoint are also spread over its shards."""
    assert len(list(mixed.glob("*.safetensors"))) == 3
    assert_same_params(tensors_of(mixed), params())
    assert convert.run([f"--source={mixed}", f"--out={tmp_path / 'out'}"]) == 0
    assert_same_params(loaded(tmp_path / "out"), params())


def test_another_codec_replaces_that_of_the_huggingface_layout(huggingface, codec):
    assert_same_params(tensors_of(huggingface, codec), params())


def test_a_single_file_is_read(sesame, huggingface, codec):
    assert_same_params(tensors_of(sesame / "model.safetensors", codec), params())
    (file,) = huggingface.glob("*.safetensors")
    assert_same_params(tensors_of(file), params())


def test_older_names_of_kyutais_codebooks_are_read(sesame, tmp_path):
    renamed = {
        name.replace("embedding_sum", "embed_avg").replace("cluster_usage", "cluster_size"): tensor
        for name, tensor in fixtures.layout("kyutai_codec").items()
    }
    save_file(renamed, tmp_path / "old.safetensors")
    assert_same_params(tensors_of(sesame, tmp_path / "old.safetensors"), params())


@pytest.mark.parametrize("where", [0, 1, 2])
def test_the_audio_table_is_read_from_either_name_or_both(tmp_path, where):
    tensors = fixtures.huggingface_tensors()
    depth = "depth_decoder.model.embed_tokens.weight"
    backbone = "backbone_model.embed_tokens.embed_audio_tokens.weight"
    table = tensors.pop(depth)
    names = [(depth,), (backbone,), (depth, backbone)][where]
    fixtures.write_huggingface(tmp_path, tensors | {name: table for name in names})
    assert_same_params(tensors_of(tmp_path), params())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_narrow_types_are_read(tmp_path, dtype):
    tensors = fixtures.huggingface_tensors()
    narrow = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    got = tensors_of(fixtures.write_huggingface(tmp_path, narrow))
    for path in ("csm/text_embedding", "csm/backbone/layers/2/attn/qkv/weight"):
        np.testing.assert_array_equal(got[path], params()[path].astype(jnp.dtype(dtype)))


def test_greedy_codes_of_every_layout_are_equal(native, mixed, sesame, tmp_path):
    out, codec = tmp_path / "out", fixtures.write_codec(tmp_path / "codec", "kyutai_codec")
    assert convert.run([f"--source={sesame}", f"--codec={codec}", f"--out={out}"]) == 0
    codes = [
        csm_jax.load(directory).generate_codes("Hello.", sampling=GREEDY, max_audio_length_ms=640)
        for directory in (native, mixed, out)
    ]
    assert codes[0].shape == (8, CONFIG.num_codebooks)
    for others in codes[1:]:
        np.testing.assert_array_equal(codes[0], others)


def test_no_tensor_is_read_before_all_shapes_are_checked(tmp_path):
    tensors = fixtures.huggingface_tensors()
    del tensors["codec_model.upsample.conv.weight"]
    opened = open_checkpoint(fixtures.write_huggingface(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"missing tensor codec_model\.upsample"):
        next(opened.tensors(fixtures.shapes()))


def test_the_error_of_a_missing_codec_names_the_flag(sesame):
    with pytest.raises(CheckpointError, match=r"no codec inside: .*csm_jax\.convert .*--codec="):
        csm_jax.load(sesame)


def test_checkpoints_in_directories_of_a_run_are_named(sesame, tmp_path):
    for step in (500, 1000):
        shutil.copytree(sesame, tmp_path / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match=r"itself: name .*checkpoint-1000 or .*point-500"):
        csm_jax.load(tmp_path)


def test_a_checkpoint_in_the_cache_of_the_hub_is_named(sesame, tmp_path):
    snapshot = tmp_path / "models--sesame--csm-1b" / "snapshots" / ("0" * 40)
    shutil.copytree(sesame, snapshot)
    with pytest.raises(CheckpointError, match=f"itself: name {re.escape(str(snapshot))}$"):
        csm_jax.load(snapshot.parent.parent)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"


@pytest.mark.parametrize("name", ["model.safetensors", "ckpt.pt", "config.json"])
def test_pointers_of_git_lfs_are_named(huggingface, tmp_path, name):
    directory = tmp_path / "clone"
    shutil.copytree(huggingface, directory)
    if name != "config.json":
        for file in directory.glob("*.safetensors*"):
            file.unlink()
    (directory / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}.*a pointer of Git LFS.*git lfs pull"):
        open_checkpoint(directory)


def test_a_damaged_pickle_is_no_advice_to_run_its_code(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["csm-q8_0.gguf", "weights.npz", "fsdp_0/__0_0.distcp"])
def test_weights_of_other_programs_are_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=rf"; {name} is in a format that is not read$"):
        csm_jax.load(tmp_path)


def test_a_file_as_a_checkpoint_is_an_error_that_names_the_way(sesame):
    file = next(sesame.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="is a file: name its directory, or convert"):
        csm_jax.load(file)


def test_a_missing_shard_is_named(mixed, tmp_path):
    directory = tmp_path / "part"
    shutil.copytree(mixed, directory)
    (directory / "transformers-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks part 2 of 2 of transformers\.safetensors"):
        csm_jax.load(directory)


@pytest.mark.parametrize("wrapped", [False, True])
def test_ckpt_pt_is_read(sesame, codec, tmp_path, wrapped):
    torch = pytest.importorskip("torch")
    weights = {name: torch.tensor(t) for name, t in fixtures.layout("sesame").items()}
    # `setup_caches` of the original registers masks, which a later `torch.save` includes.
    weights["backbone_causal_mask"] = torch.ones(3, 3, dtype=torch.bool)
    torch.save({"model": weights} if wrapped else weights, tmp_path / "ckpt.pt")
    shutil.copy(sesame / "config.json", tmp_path)
    assert_same_params(tensors_of(tmp_path, codec), params())


def test_ckpt_pt_without_torch_is_an_error_that_names_torch(codec, tmp_path, monkeypatch):
    (tmp_path / "ckpt.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt needs torch: pip install torch"):
        open_checkpoint(tmp_path, codec)


@pytest.mark.parametrize("content", [b"", b"no pickle", "list", "code"])
def test_a_damaged_ckpt_pt_is_refused(tmp_path, content):
    torch = pytest.importorskip("torch")
    file = tmp_path / "ckpt.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save([1, 2] if content == "list" else {"a": Path()}, file)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt (cannot be read|is not a dictionary)"):
        open_checkpoint(tmp_path)
