"""Native checkpoints: what is stored and loaded, and damage that is detected."""

import json
import os
import shutil
from pathlib import Path

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import CONFIG, assert_same_params, loaded, params

import csm_jax
from csm_jax.checkpoints import native_format
from csm_jax.errors import CheckpointError, OutputError
from csm_jax.model.precision import Precision, resolve


def test_a_native_checkpoint_is_equal_after_saving_and_loading(native):
    assert native_format.is_native(native)
    assert native_format.load_config(native) == CONFIG
    assert_same_params(loaded(native), params())
    assert_same_params(dict(native_format.read_params(native, CONFIG)), params())
    files = {path.name for path in native.iterdir()}
    assert files == {"checksums.json", "config.json", "params", "tokenizer.json"}


# Tables for lookup: where a CPU computes in float32, bfloat16 ones are held as bits.
TABLES = ("csm/text_embedding", "csm/audio_embedding", "csm/depth_heads/weight")


@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@pytest.mark.parametrize("activations", ["float32", "weights"])
def test_parameters_are_cast_on_loading(native, weights, activations):
    """Norms get the type of activations; other parameters but the codec that of weights."""
    activations = weights if activations == "weights" else activations
    is_packed = (weights, activations) == ("bfloat16", "float32")
    precision = Precision(jnp.dtype(weights), jnp.dtype(activations), packs_tables=is_packed)
    got = loaded(native, precision)
    for path, array in params().items():
        is_norm = path.endswith("/scale")
        wanted = array if path.startswith("codec/") else array.astype(jnp.dtype(weights))
        if is_norm and not path.startswith("codec/"):
            wanted = array.astype(jnp.dtype(activations))
        if path in TABLES and is_packed:
            wanted = wanted.view(np.uint16)
        assert got[path].dtype == wanted.dtype, path
        np.testing.assert_array_equal(np.asarray(got[path]), wanted, path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_are_float32_on_a_cpu(native, dtype):
    precision = resolve(dtype)
    is_packed = dtype == "bfloat16"
    assert precision == Precision(jnp.dtype(dtype), jnp.dtype("float32"), packs_tables=is_packed)
    assert loaded(native, precision)["csm/backbone/norm/scale"].dtype == np.float32


@pytest.mark.parametrize("version", [1, 99])
def test_a_config_of_another_version_is_refused(native, tmp_path, version):
    shutil.copytree(native, tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": version}))
    with pytest.raises(CheckpointError, match=f"version {version}, this program reads 2"):
        csm_jax.load(tmp_path / "other")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "csm-jax"}'])
def test_a_damaged_native_config_is_refused(native, tmp_path, content):
    shutil.copytree(native, tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path / "damaged")):
        csm_jax.load(tmp_path / "damaged")


@pytest.mark.parametrize("damage", ["cut", "gone", "reshaped"])
def test_a_damaged_native_checkpoint_is_refused(native, tmp_path, damage):
    directory = tmp_path / "damaged"
    shutil.copytree(native, directory)
    tensor = directory / "params" / "csm.text_embedding"
    files = [file for file in tensor.rglob("*") if file.is_file()]
    assert files
    if damage == "cut":
        largest = max(files, key=lambda file: file.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    elif damage == "gone":
        shutil.rmtree(tensor)
    else:
        config = json.loads((directory / "config.json").read_text())
        config["config"]["text_vocab_size"] += 1
        (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"damaged is damaged .*convert the checkpoint again"):
        csm_jax.load(directory)


def test_an_empty_directory_is_accepted_as_output(tmp_path):
    (tmp_path / "out").mkdir()
    fixtures.write_native(tmp_path / "out")
    assert_same_params(loaded(tmp_path / "out"), params())


@pytest.mark.parametrize("name", [".", "link"])
def test_other_spellings_of_an_empty_directory_are_accepted(tmp_path, monkeypatch, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    fixtures.write_native(Path(name) if name == "." else tmp_path / name)
    assert_same_params(loaded(tmp_path / "out"), params())


def test_a_checkpoint_is_never_overwritten(native):
    with pytest.raises(OutputError, match="exists and is not empty"):
        fixtures.write_native(native)
    assert_same_params(loaded(native), params())
