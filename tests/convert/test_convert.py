"""`python -m csm_jax.convert`: to the native form and back, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import CONFIG, CONVERT, assert_same_params, loaded, one_error, params, tensors_of
from safetensors.numpy import load_file

from csm_jax.checkpoints import native_format
from csm_jax.convert import __main__ as convert
from csm_jax.prompt.tokenizer import load_tokenizer


def assert_nothing_left(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir() if out.name in path.name] == []


def test_a_bfloat16_conversion_keeps_the_codec_in_float32(huggingface, tmp_path):
    """The codec stays float32; the export keeps the stored types."""
    out, back = tmp_path / "narrow", tmp_path / "back"
    assert convert.run([f"--source={huggingface}", f"--out={out}", "--dtype=bfloat16"]) == 0
    assert convert.run([f"--source={out}", f"--out={back}", "--to=hf"]) == 0
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    stored, exported = dict(native_format.read_params(out, CONFIG)), tensors_of(back)
    for path, array in params().items():
        wanted = array if path.startswith("codec/") else array.astype(jnp.bfloat16)
        for got in (stored[path], exported[path]):
            assert got.dtype == wanted.dtype, path
            np.testing.assert_array_equal(got, wanted, path)


def test_small_files_are_copied_in_both_directions(huggingface, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(huggingface, source)
    (source / "generation_config.json").write_text('{"a": 1}')
    (source / "README.md").write_text("stays behind")
    native, back = tmp_path / "native", tmp_path / "back"
    assert convert.run([f"--source={source}", f"--out={native}"]) == 0
    assert convert.run([f"--source={native}", f"--out={back}", "--to=hf"]) == 0
    assert (native / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    for directory in (native, back):
        assert (directory / "generation_config.json").read_text() == '{"a": 1}'
        tokenizer = load_tokenizer(directory, CONFIG)
        assert tokenizer.encode("[0]It's 8%.") == fixtures.TOKENIZER.encode("[0]It's 8%.")
        assert not (directory / "README.md").exists()


def test_native_to_huggingface_and_back_gives_equal_parameters(native, tmp_path, monkeypatch):
    monkeypatch.setattr("csm_jax.convert.export.SHARD_BYTES", 100_000)
    there, back = tmp_path / "there", tmp_path / "back"
    assert convert.run([f"--source={native}", f"--out={there}", "--to=hf"]) == 0
    shards = sorted(there.glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((there / "model.safetensors.index.json").read_text())
    for shard in shards:
        names = load_file(shard).keys()
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == names
    assert convert.run([f"--source={there}", f"--out={back}"]) == 0
    assert_same_params(loaded(back), params())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_transformers_loads_an_export_with_equal_weights(tmp_path, dtype):
    """Converts its random weights to the native layout and back: they must be equal."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchtune")
    sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
    import oracles

    original = oracles.hf_model(CONFIG)
    source = oracles.save_hf(original, tmp_path / "source")
    fixtures.TOKENIZER.save(source)
    native, out = tmp_path / "native", tmp_path / "out"
    narrow = [] if dtype is None else [f"--dtype={dtype}"]
    assert convert.run([f"--source={source}", f"--out={native}", *narrow]) == 0
    assert convert.run([f"--source={native}", f"--out={out}", "--to=hf"]) == 0
    model = transformers.CsmForConditionalGeneration.from_pretrained(out)
    assert model.dtype == getattr(torch, dtype or "float32")
    got, want = model.state_dict(), original.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        if "codebook." not in name:  # sums and counts, of which only the ratio matters
            assert torch.equal(got[name], tensor.to(got[name].dtype)), name
    for name, module in original.named_modules():
        if hasattr(module, "cluster_usage"):
            embed = model.get_submodule(name).embed
            assert torch.equal(embed, module.embed.to(embed.dtype)), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --source and --out"),
        (["--source=x"], "give --source and --out"),
        (["--source={hf}", "--out={out}", "--dtype=int8"], "dtype is int8, but must be one of"),
        (["--source={hf}", "--out={out}", "--to=onnx"], "--to is onnx, but must be native or hf"),
        (["--source={native}", "--out={out}"], "is native already; --to=hf"),
        (["--source={hf}", "--out={out}", "--to=hf"], "is no native checkpoint"),
        (["--source={native}", "--out={out}", "--to=hf", "--quantize=int8"], "has no int8"),
        (["--source={native}", "--out={out}", "--to=hf", "--codec=x"], "--codec and --to=hf do"),
        (["--source={native}", "--out={out}", "--adapters={hf}"], "whole model and no adapters"),
        (["--source={empty}", "--out={out}"], "holds no CSM checkpoint"),
        (["--source={sesame}", "--out={out}"], "has no codec inside"),
        (["--source={sesame}", "--out={out}", "--codec={empty}"], "holds no Mimi codec"),
        (["--source={sesame}", "--out={out}", "--codec={out}"], "out does not exist"),
        (["--source={hf}", "--out={out}", "--config={empty}/none.json"], "none.json is missing"),
        (["--source={hf}", "--out={out}", "--tokenizer={empty}"], "no tokenizer.json"),
        (["--source={hf}", "--out={full}"], "full exists and is not empty"),
        (["--source={hf}", "--out={full}/file"], "file exists and is not empty"),
        (["--source={hf}", "--out={full}/file/out"], "cannot be created: [Errno"),
        (["--source=nobody/nothing", "--out={out}"], "config.json of nobody/nothing"),
        (["--sorce=x"], "Unknown command line flag 'sorce'. Did you mean: source"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, huggingface, native, sesame, tmp_path, capsys):
    empty, full, out = tmp_path / "empty", tmp_path / "full", tmp_path / "out"
    empty.mkdir()
    full.mkdir()
    (full / "file").write_text("mine")
    where = {"hf": huggingface, "native": native, "sesame": sesame, "empty": empty, "full": full}
    assert convert.run([flag.format(**where, out=out) for flag in flags]) == 2
    assert message in one_error(capsys)
    assert_nothing_left(out)
    assert (full / "file").read_text() == "mine"


@pytest.mark.parametrize("damage", ["missing", "extra", "misshapen", "cut", "codec"])
def test_a_damaged_source_leaves_no_output(damage, tmp_path, capsys):
    tensors = fixtures.huggingface_tensors()
    if damage == "missing":
        del tensors["lm_head.weight"]
    elif damage == "extra":
        tensors["lm_head.bias"] = np.zeros(3, np.float32)
    elif damage == "misshapen":
        tensors["lm_head.weight"] = tensors["lm_head.weight"][1:]
    elif damage == "codec":
        del tensors["codec_model.upsample.conv.weight"]
    source, out = fixtures.write_huggingface(tmp_path / "source", tensors), tmp_path / "out"
    if damage == "cut":
        (file,) = source.glob("*.safetensors")
        os.truncate(file, file.stat().st_size - 100)
    assert convert.run([f"--source={source}", f"--out={out}"]) == 2
    expected = {
        "missing": "missing tensor lm_head.weight",
        "extra": "unexpected tensor lm_head.bias",
        "misshapen": "lm_head.weight is [34, 48] but the config wants [35, 48]",
        "cut": "is damaged or was not downloaded whole",
        "codec": "missing tensor codec_model.upsample.conv.weight",
    }
    assert expected[damage] in one_error(capsys)
    assert_nothing_left(out)


def test_too_little_disk_space_is_reported_before_writing(
    huggingface, tmp_path, monkeypatch, capsys
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert convert.run([f"--source={huggingface}", f"--out={tmp_path / 'out'}"]) == 2
    assert "out needs 0.0 GB, but its disk has 0.0 GB free" in one_error(capsys)
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_no_output(huggingface, native, tmp_path, to):
    """A limit of 16 blocks on file sizes makes real writes fail half-way."""
    source = huggingface if to == "native" else native
    limited = ["sh", "-c", 'ulimit -f 16; exec "$@"', "sh", *CONVERT]
    flags = [f"--source={source}", f"--out={tmp_path / 'out'}", f"--to={to}"]
    done = subprocess.run([*limited, *flags], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"csm_jax.convert: error: {tmp_path / 'out'} could not be ")
    assert done.stderr.count("\n") == 1
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_values_that_are_not_finite_are_not_converted(tmp_path, capsys, value):
    """A million overflows float16."""
    tensors = fixtures.huggingface_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
    tensors["lm_head.weight"][1, 2] = value
    source, out = fixtures.write_huggingface(tmp_path / "source", tensors), tmp_path / "out"
    assert convert.run([f"--source={source}", f"--out={out}", "--dtype=float16"]) == 2
    assert "csm/codebook0_head/weight has values that are NaN or infinite" in one_error(capsys)
    assert_nothing_left(out)
