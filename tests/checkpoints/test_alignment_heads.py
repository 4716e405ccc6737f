"""`alignment.json` of a checkpoint."""

import json

import pytest

from csm_jax import CheckpointError
from csm_jax.checkpoints import alignment_heads as heads
from csm_jax.checkpoints.alignment_heads import FILE_NAME, AlignmentHeads
from csm_jax.config import tiny


def test_what_is_written_is_read_again(tmp_path):
    found = AlignmentHeads(((1, 3), (0, 0)), (0.1, 0.25), (0.5, 0.75), "by hand")
    heads.write(tmp_path, found)
    assert heads.read(tmp_path, tiny()) == found


def test_a_checkpoint_without_the_file_has_no_heads(tmp_path):
    assert heads.read(tmp_path, tiny()) is None
    assert heads.read(None, tiny()) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": [[99, 0]]}, "heads are"),
        ({"heads": [[0, True]]}, "heads are"),
        ({"heads": []}, "heads are"),
        ({"lags": [2.0]}, "lags are"),
        ({"lags": "0.1"}, "lags are"),
        ({"masses": [0]}, "masses are"),
        ({"delay": 1}, "unknown key delay"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, change, message):
    values = {"heads": [[0, 0]], "lags": [0.1], "masses": [0.5], **change}
    (tmp_path / FILE_NAME).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as error:
        heads.read(tmp_path, tiny())
    assert FILE_NAME in str(error.value)


def test_the_last_lag_holds_for_all_further_words():
    found = AlignmentHeads(((0, 0),), (0.1, 0.2), (0.3,))
    assert [found.lag(i) for i in range(4)] == [0.1, 0.2, 0.2, 0.2]
    assert found.mass(5) == 0.3
