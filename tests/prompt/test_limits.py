"""`prompt_limits.json` of a checkpoint."""

import json
import shutil

import pytest

import csm_jax
from csm_jax.errors import CheckpointError
from csm_jax.loading import BUNDLED
from csm_jax.prompt import limits
from csm_jax.prompt.limits import PromptLimits


def test_what_is_written_is_read(tmp_path):
    wanted = PromptLimits(max_part_characters=40, context_seconds=12.5)
    path = limits.write(tmp_path, wanted)
    assert json.loads(path.read_text()) == {"max_part_characters": 40, "context_seconds": 12.5}
    assert limits.read(tmp_path) == wanted


def test_a_checkpoint_without_the_file_has_the_defaults(tmp_path):
    assert limits.read(tmp_path) == limits.read(None) == PromptLimits(300, 30.0)
    (tmp_path / limits.FILE_NAME).write_text('{"context_seconds": 5}')
    assert limits.read(tmp_path) == PromptLimits(300, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"max_part_characters": 0}', "max_part_characters is 0, but must be a whole number"),
        ('{"max_part_characters": 9.5}', "max_part_characters is 9.5"),
        ('{"context_seconds": "30"}', "context_seconds is '30', but must be a number above 0"),
        ('{"seconds": 30}', "unknown key seconds; known are max_part_characters and context_"),
        ("[]", "is not a JSON object"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    (tmp_path / limits.FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        limits.read(tmp_path)
    assert "\n" not in str(error.value)


def test_a_loaded_model_has_the_limits_of_its_checkpoint(tmp_path):
    """Also after a conversion."""
    from csm_jax.convert.__main__ import run

    copy, native = tmp_path / "copy", tmp_path / "native"
    shutil.copytree(BUNDLED["demo"], copy)
    limits.write(copy, PromptLimits(21, 7.0))
    assert run([f"--source={copy}", f"--out={native}"]) == 0
    for directory in (copy, native):
        inference = csm_jax.load(directory, dtype="float32").inference
        assert (inference.max_part_characters, inference.context_seconds) == (21, 7.0)
