"""Native checkpoints, and conversion from and to every published layout, with its errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import CONFIG, assert_same_params, loaded, one_error, params
from safetensors.numpy import load_file, save_file

import csm_jax
from csm_jax import checkpoint
from csm_jax.convert import __main__ as convert
from csm_jax.convert.layouts import needs_codec, open_checkpoint
from csm_jax.errors import CheckpointError, OutputError
from csm_jax.precision import Precision, resolve

GREEDY = csm_jax.Sampling(greedy=True)


def tensors_of(directory: Path, codec: Path | None = None) -> dict[str, np.ndarray]:
    return dict(open_checkpoint(directory, codec).tensors(fixtures.shapes()))


def assert_nothing_left(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir() if out.name in path.name] == []


# --- The native form ----------------------------------------------------------------------------


def test_a_native_checkpoint_is_equal_after_saving_and_loading(native):
    assert checkpoint.is_native(native)
    assert checkpoint.load_config(native) == CONFIG
    assert_same_params(loaded(native), params())
    assert_same_params(dict(checkpoint.read_params(native, CONFIG)), params())
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


# --- Published layouts --------------------------------------------------------------------------


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


# --- python -m csm_jax.convert ------------------------------------------------------------------


def test_a_bfloat16_conversion_keeps_the_codec_in_float32(huggingface, tmp_path):
    """The codec stays float32; the export keeps the stored types."""
    out, back = tmp_path / "narrow", tmp_path / "back"
    assert convert.run([f"--source={huggingface}", f"--out={out}", "--dtype=bfloat16"]) == 0
    assert convert.run([f"--source={out}", f"--out={back}", "--to=hf"]) == 0
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    stored, exported = dict(checkpoint.read_params(out, CONFIG)), tensors_of(back)
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
    for directory in (native, back):
        assert (directory / "generation_config.json").read_text() == '{"a": 1}'
        assert (directory / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
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
    sys.path.insert(0, str(Path(__file__).parent / "reference"))
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
    limited = ["sh", "-c", 'ulimit -f 16; exec "$@"', "sh", *command("convert")]
    flags = [f"--source={source}", f"--out={tmp_path / 'out'}", f"--to={to}"]
    done = subprocess.run([*limited, *flags], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"csm_jax.convert: error: {tmp_path / 'out'} could not be ")
    assert done.stderr.count("\n") == 1
    assert_nothing_left(tmp_path / "out")


def command(module: str) -> list[str]:
    return [sys.executable, "-m", f"csm_jax.{module}"]


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


# --- Killed conversions -------------------------------------------------------------------------

KILLED = """
    import os, signal, sys, time
    from csm_jax import checkpoint
    from csm_jax.convert import __main__ as convert
    from csm_jax.convert import layouts
    from csm_jax.tokenizer import BPETokenizer

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_at(pairs, count):
        for number, pair in enumerate(pairs):
            kill() if number == count else None
            yield pair

    real = layouts.convert
    if sys.argv[1] == "paused":
        kill = lambda: time.sleep(100)
    if sys.argv[1] in ("reading", "paused"):
        layouts.convert = lambda *arguments: killed_at(real(*arguments), 20)
    else:
        BPETokenizer.save = kill
    sys.exit(convert.run(sys.argv[2:]))
"""


def assert_recovers(source: Path, out: Path) -> None:
    """Checks that no checkpoint is left, and that the next run cleans up and succeeds."""
    partial, lock = sorted(out.parent.iterdir())
    assert re.fullmatch(r"\.out\.[0-9a-f]{16}\.partial", partial.name)
    assert lock.name == ".out.lock"
    assert not out.exists()
    assert not checkpoint.is_native(out)
    assert not checkpoint.is_native(partial)
    assert convert.run([f"--source={source}", f"--out={out}"]) == 0
    assert list(out.parent.iterdir()) == [out]
    assert_same_params(loaded(out), params())


@pytest.mark.parametrize("moment", ["reading", "almost done"])
def test_a_killed_conversion_leaves_no_checkpoint_and_can_be_repeated(
    huggingface, tmp_path, moment
):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    code = [sys.executable, "-c", textwrap.dedent(KILLED), moment, *flags]
    assert subprocess.run(code).returncode == -signal.SIGKILL
    if moment == "almost done":
        assert any(path.name == "params" for path in out.parent.glob("*/new/*"))
    assert_recovers(huggingface, out)


def test_a_conversion_ended_by_sigkill_leaves_no_checkpoint_and_can_be_repeated(
    huggingface, tmp_path
):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    process = subprocess.Popen([*command("convert"), *flags])
    while not list(out.parent.glob(".out.*.partial")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert_recovers(huggingface, out)


def in_namespace(*flags: str) -> subprocess.Popen:
    """Starts a conversion as process 1, as in a container; it ends with the returned process."""
    unshare = [shutil.which("unshare") or "true", "--pid", "--fork", "--kill-child"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE
    )
    if done.stdout != b"1\n":
        pytest.skip("process namespaces need rights that this user does not have")
    return subprocess.Popen([*unshare, *command("convert"), *flags], stderr=subprocess.PIPE)


def wait_for_partial(out: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(".out.*.partial/new/params/*")):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_conversion_killed_as_process_1_can_be_repeated(huggingface, tmp_path):
    """The repeated conversion has the same process id."""
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    process = in_namespace(*flags)
    wait_for_partial(out, process)
    process.kill()
    process.wait()
    again = in_namespace(*flags)
    assert again.communicate() == (None, b"")
    assert again.returncode == 0
    assert list(out.parent.iterdir()) == [out]
    assert_same_params(loaded(out), params())


def test_a_running_conversion_of_another_namespace_is_not_disturbed(huggingface, tmp_path, capsys):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    process = in_namespace(*flags)
    wait_for_partial(out, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGSTOP)
    assert convert.run(flags) == 2
    assert "could not be written (another process is writing there)" in one_error(capsys)
    assert convert.run([f"--verify={out}"]) == 2
    assert "is being written by another process" in one_error(capsys)
    os.kill(int(children[0]), signal.SIGCONT)
    assert process.communicate() == (None, b"")
    assert process.returncode == 0
    assert list(out.parent.iterdir()) == [out]
    assert_same_params(loaded(out), params())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_ended_by_a_signal_leaves_no_files(huggingface, tmp_path, number):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    code = [sys.executable, "-c", textwrap.dedent(KILLED), "paused", *flags]
    process = subprocess.Popen(code, stderr=subprocess.PIPE)
    wait_for_partial(out, process)
    process.send_signal(number)
    assert process.communicate() == (None, b"")
    assert process.returncode == -number
    assert list(out.parent.iterdir()) == []


@pytest.mark.long
def test_a_conversion_killed_at_any_moment_can_be_repeated(huggingface, tmp_path):
    out = tmp_path / "home" / "out"
    flags = [f"--source={huggingface}", f"--out={out}"]
    random = np.random.default_rng(0)
    for _ in range(10):
        process = subprocess.Popen([*command("convert"), *flags])
        while not out.parent.exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(random.uniform(0, 1.5))
        process.kill()
        process.wait()
        assert convert.run([f"--verify={out}"]) == (0 if out.exists() else 2)
        if out.exists():
            assert_same_params(loaded(out), params())
            shutil.rmtree(out)
    assert convert.run(flags) == 0
    assert list(out.parent.iterdir()) == [out]
    assert_same_params(loaded(out), params())


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
