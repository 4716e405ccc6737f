"""Names of checkpoints and adapters that cannot be meant as they are written."""

import pytest

import csm_jax
from csm_jax.convert import __main__ as convert
from csm_jax.errors import CheckpointError, InputError
from csm_jax.loading import find_adapters, find_directory


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("https://huggingface.co/sesame/csm-1b", "sesame/csm-1b"),
        ("https://hf.co/sesame/csm-1b/", "sesame/csm-1b"),
        ("huggingface.co/sesame/csm-1b", "sesame/csm-1b"),
        ("hf://sesame/csm-1b", "sesame/csm-1b"),
        ("https://huggingface.co/sesame/csm-1b/tree/abc", "sesame/csm-1b@abc"),
        ("Demo", "demo"),
        ("demo/", "demo"),
        ("RANDOM:TINY", "random:tiny"),
    ],
)
def test_the_name_that_is_meant_is_told(name, meant):
    with pytest.raises(CheckpointError, match=f"; write {meant}$"):
        find_directory(name)


@pytest.mark.parametrize("name", ["random:small", "a\0b", "~/nothing/here/at/all", "a" * 5000])
def test_other_names_are_one_line(name):
    with pytest.raises(CheckpointError, match="is neither a directory nor a hub name"):
        find_directory(name)


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_working_directory(name):
    with pytest.raises(CheckpointError, match="the checkpoint has no name"):
        find_directory(name)


@pytest.mark.parametrize("name", ["", ["one", "two"], 3])
def test_adapters_are_one_name(name):
    with pytest.raises(InputError, match=r"adapters is .* must be the name of one directory"):
        csm_jax.load("random:tiny", adapters=name)


def test_an_address_of_adapters_is_told_as_a_name():
    with pytest.raises(CheckpointError, match=r"; write someone/csm-lora$"):
        find_adapters("https://huggingface.co/someone/csm-lora")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://huggingface.co/sesame/csm-1b", "does not exist; write sesame/csm-1b"),
        ("", "source '' does not exist"),
        ("/nothing/here/at/all", "source '/nothing/here/at/all' does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_one_line(tmp_path, capsys, name, message):
    assert convert.run([f"--source={name}", f"--out={tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err
