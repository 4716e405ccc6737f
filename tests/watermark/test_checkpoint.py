"""The weights of a watermark in files."""

import numpy as np
import pytest

from csm_jax.errors import CheckpointError
from csm_jax.watermark import checkpoint, find_weights
from csm_jax.watermark.config import WatermarkConfig, tiny
from csm_jax.watermark.finding import default_file

HPARAMS = """\
SR: 44100
N_FFT: 4096
HOP_LENGTH: 2048
message_band_size: 1024
message_dim: 5
message_len: 21
n_messages: 1
ensure_negative_message: true
utterance_level_normalization: true
frame_level_normalization: false
no_normalization: false
enc_n_layers: 3
dec_c_n_layers: 4
"""


def _flat(weights):
    return checkpoint._flatten(weights.params)


def test_a_file_gives_the_weights_that_were_saved(tmp_path):
    weights = checkpoint.random_weights(tiny(), seed=3)
    checkpoint.save(weights, tmp_path / "w.safetensors")
    loaded = find_weights(str(tmp_path / "w.safetensors"))
    assert loaded.config == weights.config
    expected = _flat(weights)
    assert {*_flat(loaded)} == {*expected}
    for name, value in _flat(loaded).items():
        np.testing.assert_array_equal(value, expected[name])


def test_weights_are_found_in_the_cache_only_if_they_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("CSM_JAX_CACHE", str(tmp_path))
    assert find_weights() is None
    default_file().parent.mkdir()
    checkpoint.save(checkpoint.random_weights(tiny()), default_file())
    assert find_weights().config == tiny()


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "cannot be read"), (b"x" * 100, "cannot be read")],
)
def test_damaged_files_are_refused(tmp_path, data, message):
    file = tmp_path / "w.safetensors"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        find_weights(str(file))


def test_files_of_something_else_are_refused(tmp_path):
    import safetensors.numpy

    file = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, file)
    with pytest.raises(CheckpointError, match="holds no watermark"):
        find_weights(str(file))


def test_files_with_other_shapes_than_their_sizes_are_refused(tmp_path):
    weights = checkpoint.random_weights(tiny())
    weights.params["band"]["kernel"] = weights.params["band"]["kernel"][:5]
    checkpoint.save(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"band\.kernel"):
        find_weights(str(tmp_path / "w.safetensors"))


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="do not exist"):
        find_weights(str(tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError, match=r"has no hparams\.yaml"):
        find_weights(str(tmp_path))
    (tmp_path / "hparams.yaml").write_text(HPARAMS)
    with pytest.raises(CheckpointError, match=r"enc_c\.ckpt is missing"):
        find_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("HOP_LENGTH: 2048", "HOP_LENGTH: 1024", "only half of N_FFT"),
        ("n_messages: 1", "n_messages: 2", "n_messages is 2"),
        ("no_normalization: false", "no_normalization: true", "no_normalization is true"),
        ("message_dim: 5", "message_dim: five", "five"),
        ("SR: 44100\n", "", "SR"),
    ],
)
def test_networks_of_another_kind_are_refused(tmp_path, old, new, message):
    assert checkpoint._read_hparams(_write(tmp_path, HPARAMS)) == WatermarkConfig()
    with pytest.raises(CheckpointError, match=message):
        checkpoint._read_hparams(_write(tmp_path, HPARAMS.replace(old, new)))


def _write(directory, text):
    (directory / "hparams.yaml").write_text(text)
    return directory / "hparams.yaml"
