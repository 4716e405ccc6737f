"""Alignment heads of a checkpoint that has none: found once, kept beside it or in the cache."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fixtures import write_native

import csm_jax
from csm_jax.align import finding
from csm_jax.align.__main__ import run
from csm_jax.checkpoints import alignment_heads as heads
from csm_jax.cli import flags as cli
from csm_jax.generate import run as generate
from csm_jax.io.files import check_file
from csm_jax.loading import BUNDLED, alignment

DEMO = BUNDLED["demo"]
HEADS = csm_jax.load("demo").alignment.heads


@pytest.fixture
def checkpoint(tmp_path):
    """The bundled checkpoint without its alignment heads."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(DEMO, directory)
    (directory / heads.FILE_NAME).unlink()
    return directory


def calibrate(*flags: str) -> int:
    return run(["--calibrate", *flags])


def read(directory: Path) -> dict:
    return json.loads((directory / heads.FILE_NAME).read_text())


# --- --calibrate --------------------------------------------------------------------------------


def test_the_bundled_head_is_found_with_the_voices_of_the_checkpoint(checkpoint, capsys):
    assert calibrate(f"--checkpoint={checkpoint}") == 0
    assert tuple(map(tuple, read(checkpoint)["heads"])) == HEADS
    assert read(checkpoint)["source"] == "the 2 voices of the checkpoint"
    assert csm_jax.load(checkpoint).alignment.heads == HEADS
    written = capsys.readouterr()
    assert written.out.startswith(f"{checkpoint / heads.FILE_NAME}: head 5 of layer 5")
    assert "the lag is a guess" in written.err


def test_without_voices_its_own_speech_serves(checkpoint):
    shutil.rmtree(checkpoint / "prompts")
    assert calibrate(f"--checkpoint={checkpoint}") == 0
    assert tuple(map(tuple, read(checkpoint)["heads"])) == HEADS
    assert read(checkpoint)["source"] == "its own speech"


def test_recordings_with_words_beside_them_give_lags(checkpoint, tmp_path, capsys):
    """The times of `generate --words_out`, with the lags of the bundled file, give these again."""
    data = tmp_path / "data"
    flags = ["--checkpoint=demo", f"--out_dir={data}", "--words_out=.json", "--batch=6"]
    lines = [{"text": text, "id": str(i), "seed": i} for i, text in enumerate(finding.TEXTS[:6])]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert generate([*flags, f"--manifest={tmp_path / 'lines.jsonl'}"]) == 0
    rows = [{"text": line["text"], "audio": f"data/{line['id']}.wav"} for line in lines]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert calibrate(f"--checkpoint={checkpoint}", f"--data={tmp_path / 'data.jsonl'}") == 0
    found = read(checkpoint)
    assert found["source"] == "6 recordings of data.jsonl"
    assert tuple(map(tuple, found["heads"])) == HEADS
    lags = csm_jax.load("demo").alignment.lags
    np.testing.assert_allclose(found["lags"][1:], lags[1:], atol=0.05)
    assert "lag is a guess" not in capsys.readouterr().err


def test_an_existing_file_is_kept(checkpoint, capsys):
    (checkpoint / heads.FILE_NAME).write_text("kept")
    assert calibrate(f"--checkpoint={checkpoint}") == cli.USAGE_ERROR
    assert "exists: remove it" in capsys.readouterr().err
    assert (checkpoint / heads.FILE_NAME).read_text() == "kept"


def test_random_weights_are_refused(tmp_path, capsys):
    directory = write_native(tmp_path / "random")
    for name, message in (
        (str(directory), "no attention head follows the text"),
        ("random:tiny", "random:tiny has random weights"),
    ):
        assert calibrate(f"--checkpoint={name}") == cli.USAGE_ERROR
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (directory / heads.FILE_NAME).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--audio=a.wav"], "--audio and --calibrate do not go together"),
        (["--data=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_bad_flags_are_one_line(checkpoint, capsys, flags, message):
    assert calibrate(f"--checkpoint={checkpoint}", *flags) == cli.USAGE_ERROR
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (checkpoint / heads.FILE_NAME).exists()


def test_times_that_are_no_words_are_refused(checkpoint, tmp_path, capsys):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * np.ones(24_000), 24_000)
    rows = [{"text": "one", "audio": f"{name}.wav"} for name in ("a", "b")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text('{"one": 1}')
    flags = [f"--checkpoint={checkpoint}", f"--data={tmp_path / 'data.jsonl'}"]
    assert calibrate(*flags) == cli.USAGE_ERROR
    assert f"{tmp_path / 'b.json'} is no list of" in capsys.readouterr().err


# --- On first use -------------------------------------------------------------------------------


def speak(checkpoint: Path, out: Path) -> list[dict]:
    flags = [f"--checkpoint={checkpoint}", "--text=one two", f"--out={out / 'x.wav'}"]
    assert generate([*flags, f"--words_out={out / 'x.json'}"]) == 0
    return json.loads((out / "x.json").read_text())


def test_words_find_the_heads_of_a_checkpoint_once(checkpoint, tmp_path, capsys):
    words = speak(checkpoint, tmp_path)
    assert [word["text"] for word in words] == ["one", "two"]
    assert "its alignment heads are looked for, once" in capsys.readouterr().err
    assert tuple(map(tuple, read(checkpoint)["heads"])) == HEADS
    assert speak(checkpoint, tmp_path) == words
    assert "looked for" not in capsys.readouterr().err


def test_heads_of_a_checkpoint_that_is_read_only_are_in_the_cache(
    checkpoint, tmp_path, capsys, monkeypatch
):
    """Root can write anywhere, so the write fails by itself."""
    write = heads.write

    def write_elsewhere(directory, found):
        if directory == checkpoint:
            raise PermissionError(13, "Permission denied")
        return write(directory, found)

    monkeypatch.setattr(heads, "write", write_elsewhere)
    monkeypatch.setenv("CSM_JAX_CACHE", str(tmp_path / "cache"))
    words = speak(checkpoint, tmp_path)
    assert "looked for, once" in capsys.readouterr().err
    assert not (checkpoint / heads.FILE_NAME).exists()
    (kept,) = (tmp_path / "cache" / "alignment").glob("*/alignment.json")
    assert csm_jax.load(checkpoint).alignment.heads == HEADS
    assert speak(checkpoint, tmp_path) == words
    assert "looked for" not in capsys.readouterr().err
    # Those of other weights are others.
    (checkpoint / "config.json").touch()
    assert csm_jax.load(checkpoint).alignment is None
    check_file(kept)


def test_the_cache_is_not_asked_where_the_checkpoint_has_a_file(tmp_path):
    assert alignment.read_alignment(None, csm_jax.tiny()) is None
    assert alignment.read_alignment(DEMO, csm_jax.load("demo").config).heads == HEADS
