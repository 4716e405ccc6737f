"""Checksums of native checkpoints, `--verify`, and damage found on loading."""

import gzip
import json
import os
import shutil
from pathlib import Path

import fixtures
import numpy as np
import pytest
from fixtures import assert_same_params, loaded, one_error, params

import csm_jax
from csm_jax.convert import __main__ as convert
from csm_jax.errors import CheckpointError


@pytest.fixture
def copy(native, tmp_path):
    shutil.copytree(native, tmp_path / "copy")
    return tmp_path / "copy"


def largest_file(directory: Path) -> Path:
    return max((directory / "params").rglob("*"), key=lambda path: path.stat().st_size)


def make_noise(file: Path) -> None:
    """Overwrites 4 kB in the middle of a file without changing its size."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = np.random.default_rng(0).bytes(4096)
    file.write_bytes(content)


def test_checksums_equal_those_of_gzip(native):
    sums = json.loads((native / "checksums.json").read_text())["files"]
    files = {path.relative_to(native).as_posix() for path in native.rglob("*") if path.is_file()}
    assert sums.keys() == files - {"checksums.json"}
    for name, values in sums.items():
        *_, crc, size = np.frombuffer(gzip.compress((native / name).read_bytes())[-8:], "<u4")
        assert (values["size"], values["crc32"]) == (size, f"{crc:08x}"), name


def test_an_undamaged_checkpoint_is_verified(native, copy, tmp_path, capsys):
    """The directory may have any name, and other files may be added to it."""
    (copy / "prompts").mkdir()
    (copy / "prompts" / "voice.wav").write_bytes(b"")
    (tmp_path / "link").symlink_to(copy)
    for directory in (native, copy, tmp_path / "link"):
        assert convert.run([f"--verify={directory}"]) == 0
        out = capsys.readouterr().out
        assert "files are as they were written" in out
        assert out.count("\n") == 1


def noise_in_weights(copy):
    make_noise(largest_file(copy))
    return "has changed"


def noise_in_the_tokenizer(copy):
    file = copy / "tokenizer.json"
    file.write_text(file.read_text().replace("a", "b", 1))
    return "tokenizer.json has changed"


def a_small_file_changed(copy):
    """The meaning of the file is the same."""
    file = copy / "config.json"
    file.write_text(file.read_text().replace(": ", " :", 1))
    return "config.json has changed"


def a_missing_file(copy):
    (copy / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


def a_shorter_file(copy):
    os.truncate(largest_file(copy), 100)
    return "has 100 bytes"


def a_file_more(copy):
    (copy / "params" / "more").write_text("")
    return "params/more is additional"


def a_pipe(copy):
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    return "tokenizer.json is not a file"


def no_checksums(copy):
    (copy / "checksums.json").unlink()
    return "checksums.json is missing"


def noise_in_checksums(copy):
    (copy / "checksums.json").write_text('{"files": {"config.json": 5}}')
    return "checksums.json is damaged"


def checksums_outside(copy):
    text = json.dumps({"files": {"../native": {"size": 1, "crc32": "0"}}})
    (copy / "checksums.json").write_text(text)
    return "names ../native, which is outside"


def no_config(copy):
    (copy / "config.json").unlink()
    return "config.json is missing"


def nothing(copy):
    shutil.rmtree(copy)
    return "does not exist"


def nothing_in_it(copy):
    shutil.rmtree(copy)
    copy.mkdir()
    return "holds no checkpoint"


DAMAGE = [
    noise_in_weights,
    noise_in_the_tokenizer,
    a_small_file_changed,
    a_missing_file,
    a_shorter_file,
    a_file_more,
]
DAMAGE += [a_pipe, no_checksums, noise_in_checksums, checksums_outside, no_config]
DAMAGE += [nothing, nothing_in_it]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_verify_finds_damage(copy, capsys, damage):
    says = damage(copy)
    assert convert.run([f"--verify={copy}"]) == 2
    error = one_error(capsys)
    assert says in error
    assert str(copy) in error


@pytest.mark.parametrize("damage", [a_small_file_changed, a_shorter_file, no_checksums])
def test_damage_beside_the_weights_and_wrong_sizes_are_found_on_loading(copy, damage):
    says = damage(copy)
    with pytest.raises(CheckpointError, match=says):
        csm_jax.load(copy)


def test_checkpoints_of_older_versions_load_without_checksums(copy, capsys):
    values = json.loads((copy / "config.json").read_text())
    del values["checksums"]
    (copy / "config.json").write_text(json.dumps(values))
    (copy / "checksums.json").unlink()
    assert_same_params(loaded(copy), params())
    assert convert.run([f"--verify={copy}"]) == 0
    assert "there are no checksums to compare them with" in capsys.readouterr().out


def test_verify_checks_other_layouts_for_completeness_and_finite_values(mixed, tmp_path, capsys):
    assert convert.run([f"--verify={mixed}"]) == 0
    assert "tensors" in capsys.readouterr().out
    tensors = fixtures.huggingface_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][1, 2] = np.nan
    source = fixtures.write_huggingface(tmp_path / "source", tensors)
    assert convert.run([f"--verify={source}"]) == 2
    assert "lm_head.weight has values that are NaN or infinite" in one_error(capsys)


@pytest.mark.parametrize("flag", ["out", "dtype", "to"])
def test_verify_accepts_no_other_flag(native, capsys, flag):
    assert convert.run([f"--verify={native}", f"--{flag}=float32"]) == 2
    assert f"--verify takes no other flag, but --{flag} is given" in one_error(capsys)
