"""`python -m csm_jax.finetune`, from recordings to a model that generates them."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fixtures
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from safetensors.numpy import load_file

import csm_jax
from csm_jax import finetune, generate
from csm_jax.checkpoints import native_format
from csm_jax.cli import training_flags
from csm_jax.convert import __main__ as convert
from csm_jax.io.audio import load_audio
from csm_jax.model.precision import FLOAT32
from csm_jax.model.sampling import Sampling
from csm_jax.train.pretrained import load_pretrained
from csm_jax.train.result import write_result

CONFIG = csm_jax.tiny()
# Compiled in less time than `tiny()`.
MODEL = fixtures.shallow()


pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fixtures.write_conversations(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def common(shallow):
    """Flags of short runs; every test adds its own."""
    return [f"--checkpoint={shallow}", "--batch_size=2", "--max_len=512", "--log_every=1"]


@pytest.fixture(scope="module")
def run(common):
    return lambda *arguments: finetune.run([*common, *arguments])


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("frames_per_second",)
    return [{name: v for name, v in line.items() if name not in timed} for line in lines]


def state(out: Path, step: int) -> list[np.ndarray]:
    """All arrays of a checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((out / "checkpoints" / str(step) / "state").absolute())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def assert_same_runs(one: Path, other: Path, step: int) -> None:
    assert metrics(one) == metrics(other)
    ours, theirs = state(one, step), state(other, step)
    assert len(ours) == len(theirs) > 50
    for mine, yours in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, yours)


@pytest.fixture(scope="module")
def whole_run(data, run, tmp_path_factory):
    """6 steps without an interruption, and the flags of the run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    flags = [f"--data={data}", "--steps=6", "--save_every=2", "--eval_every=3", "--ema=0.5"]
    assert run(*flags, f"--out={out}") == 0
    return out, flags


def test_a_run_writes_metrics_checkpoints_and_a_model(whole_run):
    out, _ = whole_run
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5, 6]
    evaluated = [line for line in metrics(out) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    assert len(evaluated[0]["eval_by_codebook"]) == CONFIG.num_codebooks
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert (out / "loss.png").stat().st_size > 5000
    assert any((out / "tensorboard").iterdir())
    model = csm_jax.load(out / "model")
    assert len(model.generate("x", max_audio_length_ms=160)) <= 2 * CONFIG.codec.frame_size


def test_the_result_is_the_moving_average(whole_run):
    """They are not the parameters after the last step, from which a decay of 0.5 tells them."""
    out, _ = whole_run
    stored = state(out, 6)
    result = dict(native_format.read_params(out / "model", MODEL))["csm/projection/weight"]
    same = [leaf for leaf in stored if leaf.shape == result.shape and np.array_equal(leaf, result)]
    assert len(same) == 1, "the checkpoint has parameters, moments and averages of this shape"


@pytest.fixture(scope="module")
def start(common, compiled_alike):
    """Starts a run in a process of its own."""

    def start(out: Path, flags: list[str], **named) -> subprocess.Popen:
        command = [sys.executable, "-m", "csm_jax.finetune", *common, *flags, f"--out={out}"]
        return subprocess.Popen(command, env=os.environ | compiled_alike, **named)

    return start


def wait_for(done, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_step(out: Path, step: int) -> bool:
    path = out / "metrics.jsonl"
    return path.is_file() and f'"step": {step},' in path.read_text()


@pytest.mark.parametrize(
    "step", [1, *(pytest.param(step, marks=pytest.mark.long) for step in (3, 5))]
)
def test_a_killed_run_is_resumed_with_equal_results(run, whole_run, tmp_path, start, step):
    """Before the first checkpoint, between two, while one is written."""
    whole, flags = whole_run
    out = tmp_path / "run"
    process = start(out, flags, stderr=subprocess.DEVNULL)
    wait_for(lambda: has_step(out, step), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "model").exists()
    assert run(*flags, f"--out={out}") == 0
    assert_same_runs(out, whole, 6)


def test_sigterm_saves_a_checkpoint_and_ends_the_run(run, whole_run, tmp_path, start):
    whole, flags = whole_run
    out = tmp_path / "run"
    process = start(out, flags, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: has_step(out, 1), process)
    process.terminate()
    _, stderr = process.communicate()
    assert process.returncode == 0
    assert "goes on from there" in stderr
    stopped = metrics(out)[-1]["step"]
    assert 1 <= stopped < 6
    assert str(stopped) in [path.name for path in (out / "checkpoints").iterdir()]
    assert run(*flags, f"--out={out}") == 0
    assert_same_runs(out, whole, 6)


def test_a_directory_has_one_run_at_a_time(run, whole_run, tmp_path, capsys):
    """The lock is held here as another process would hold it, and free afterwards."""
    whole, flags = whole_run
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(whole / "run.json", out)
    with open(out / ".run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(*flags, f"--out={out}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"csm_jax.finetune: error: {out} could not be written (another ")
    assert sorted(path.name for path in out.iterdir()) == [".run.lock", "run.json"]
    assert run(*flags, f"--out={out}") == 0
    assert metrics(out) == metrics(whole)
    assert not (out / ".run.lock").exists()


@pytest.mark.parametrize(
    "size", [200, 20_000, *(pytest.param(n, marks=pytest.mark.long) for n in (2000, 50_000))]
)
def test_a_run_on_a_full_disk_ends_with_a_line_and_can_be_resumed(
    run, common, whole_run, tmp_path, size
):
    """Files cannot grow beyond `size` bytes: the settings, the metrics, or a checkpoint fail."""
    whole, flags = whole_run
    out = tmp_path / "run"
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({size}, r.RLIM_INFINITY)); "
    code = f"{limit} import sys; from csm_jax import finetune; sys.exit(finetune.run())"
    arguments = [*common, *flags, f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"csm_jax.finetune: error: {out}")
    assert "(File too large)" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert run(*flags, f"--out={out}") == 0
    assert_same_runs(out, whole, 6)


def test_a_result_is_replaced_only_by_a_complete_one(run, whole_run, tmp_path, monkeypatch, capsys):
    whole, flags = whole_run
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = (out / "model").stat().st_ino

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("csm_jax.checkpoints.native_format.write_beside_weights", full)
        assert run(*flags, f"--out={out}") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (out / "model").stat().st_ino == before
    assert run(*flags, f"--out={out}") == 0
    assert (out / "model").stat().st_ino != before
    ours, theirs = (dict(native_format.read_params(path / "model", MODEL)) for path in (out, whole))
    fixtures.assert_same_params(ours, theirs)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_a_run_cannot_be_resumed_with_other_settings(run, whole_run, capsys):
    out, flags = whole_run
    assert run(*flags, f"--out={out}", "--learning_rate=0.5") == 2
    assert "--learning_rate" in capsys.readouterr().err


def test_saving_evaluating_and_sampling_do_not_change_the_losses(run, whole_run, tmp_path):
    """Nor do the parts of a batch, up to rounding."""
    whole, flags = whole_run
    out = tmp_path / "run"
    more = ["--accumulate=2", "--save_every=5", "--eval_every=0", "--sample_every=3"]
    assert run(*flags, *more, f"--out={out}") == 0
    losses, want = ([line["loss"] for line in metrics(path)] for path in (out, whole))
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    assert {path.name for path in (out / "samples").iterdir()} == {
        "step-000003.wav",
        "step-000006.wav",
    }


def test_the_result_has_the_prompt_of_its_model(tmp_path):
    """Its training data have it too: `train.examples` makes turns with the same config."""
    spaced = dataclasses.replace(
        CONFIG, space_after_speaker=True, default_max_audio_length_ms=90_000
    )
    base = tmp_path / "base"
    native_format.save(base, spaced, fixtures.params().items(), fixtures.TOKENIZER)
    pretrained = load_pretrained(str(base), FLOAT32, None)
    out = write_result(tmp_path, pretrained, jax.device_get(pretrained.params), None, FLOAT32)
    assert native_format.load_config(out) == spaced


def test_a_memorized_conversation_is_generated_to_the_code(run, tmp_path, capsys):
    """It is trained on until greedy sampling gives its codes."""
    data = fixtures.write_conversations(tmp_path, lengths=[(7,)])
    out = tmp_path / "run"
    flags = [f"--data={data}", "--depth_share=0.5", "--learning_rate=1e-2", "--weight_decay=0"]
    flags += ["--checkpoint=random:tiny", "--steps=120"]
    assert run(*flags, "--batch_size=1", f"--out={out}", "--log_every=20") == 0
    capsys.readouterr()
    assert finetune.run([f"--checkpoint={out / 'model'}", f"--data={data}", "--eval_only"]) == 0
    losses = json.loads(capsys.readouterr().out)
    assert losses["loss"] < 0.1
    assert losses["num_frames"] == 8
    assert losses["loss"] == pytest.approx(losses["backbone_loss"] + losses["depth_decoder_loss"])
    model = csm_jax.load(out / "model")
    codes = model.codec.encode(load_audio(tmp_path / "0-0.wav", 24_000), CONFIG.num_codebooks)
    generated = model.generate_codes("0 0", speaker=0, sampling=Sampling(greedy=True))
    np.testing.assert_array_equal(generated, codes)


def test_a_run_without_finite_gradients_ends(run, data, tmp_path, capsys):
    """After a step of 1e30 nothing is finite any more; the error names the checkpoint before."""
    out = tmp_path / "run"
    flags = [f"--data={data}", "--steps=20", "--save_every=1", "--warmup=0"]
    assert run(*flags, "--learning_rate=1e30", "--patience=3", f"--out={out}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 steps in a row" in error
    assert f"{out / 'checkpoints' / '1'}" in error
    assert [line["skipped"] for line in metrics(out)][:3] == [0, 1, 2]


def test_a_run_with_adapters_writes_them_alone(run, shallow, data, tmp_path, capsys):
    """They are merged when they are loaded; the base stays as it was."""
    out = tmp_path / "run"
    flags = [f"--data={data}", "--steps=4", "--learning_rate=0.05", "--lora_targets=q,v,down"]
    assert run(*flags, "--lora_rank=3", f"--out={out}") == 0
    assert re.search(r"4 steps; compiled for rows of [\d, ]+ in \d+\.\d s", capsys.readouterr().err)
    tensors = load_file(out / "adapters" / "adapter_model.safetensors")
    layers = MODEL.backbone.num_layers + MODEL.depth_decoder.num_layers
    assert len(tensors) == 2 * 3 * layers
    plain, tuned = (csm_jax.load(shallow, adapters=a) for a in (None, out / "adapters"))
    for layer in range(MODEL.backbone.num_layers):
        block = tuned.params["backbone"]["layers"][layer]
        before = plain.params["backbone"]["layers"][layer]
        assert not np.array_equal(block["attn"]["qkv"]["weight"], before["attn"]["qkv"]["weight"])
        assert np.array_equal(block["attn"]["o"]["weight"], before["attn"]["o"]["weight"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--data={data}", "--lora_rank=2", "--adapters=x"],
            "--adapters first",
        ),
        (
            ["--data={data}", "--lora_rank=2", "--from_scratch"],
            "would not be saved",
        ),
        (["--data=nowhere.jsonl"], "nowhere.jsonl"),
        (["--data={data}", "--depth_share=0"], "--depth_share is 0.0"),
        (["--data={data}", "--depth_share=2"], "--depth_share is 2.0"),
        (["--data={data}", "--batch_size=3", "--accumulate=2"], "multiple of 2"),
        (["--data={data}", "--lora_rank=2", "--lora_targets=q,x"], "x is no target"),
        (["--data={data}", "--dtype=float16"], "float16"),
        (["--data={data}", "--turns=some"], "--turns is some"),
        (["--data={data}", "--speakers=0,a"], "--speakers has a"),
        (["--data={data}", "--speakers=7"], "4 of 4 conversations"),
        (["--data={data}", "--holdout=1"], "--holdout is 1.0"),
        (["--data={data}", "--checkpoint=/nowhere"], "/nowhere"),
        (["--data={data}", "--fsdp=3"], "fsdp is 3"),
        (["--data={data}", "--warmup=2000"], "warmup is 2000"),
        (["--data={data}", "--learning_rate=-1"], "learning_rate is -1"),
        (["--dta={data}"], "dta"),
        ([], "--data is missing"),
    ],
)
def test_wrong_flags_are_one_line(run, flags, message, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(*(flag.format(data=data) for flag in flags), f"--out={out}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("csm_jax.finetune: error: ")
    assert message in error
    assert not out.exists()


def test_a_directory_with_other_files_is_refused(run, data, tmp_path, capsys):
    (tmp_path / "precious").write_text("mine")
    assert run(f"--data={data}", f"--out={tmp_path}") == 2
    assert "no run" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["precious"]


def test_convert_with_adapters_equals_loading_with_adapters(run, shallow, data, tmp_path):
    """`convert --adapters` writes the weights of `load(adapters=)`, with the same codes."""
    adapters, merged = tmp_path / "run" / "adapters", tmp_path / "merged"
    flags = [f"--data={data}", "--steps=2", "--learning_rate=0.05", f"--out={tmp_path / 'run'}"]
    assert run(*flags, "--lora_rank=2") == 0
    source = [f"--source={shallow}", f"--adapters={adapters}"]
    assert convert.run([*source, f"--out={merged}"]) == 0
    ours = native_format.flatten(csm_jax.load(merged).params)
    fixtures.assert_same_params(
        ours, native_format.flatten(csm_jax.load(shallow, adapters=adapters).params)
    )
    codes = []
    for chosen in (
        [f"--checkpoint={shallow}", f"--adapters={adapters}"],
        [f"--checkpoint={merged}"],
    ):
        out = [f"--out={tmp_path / 'x.wav'}", f"--codes_out={tmp_path / 'x.npy'}"]
        common = ["--text=Hello", "--max_audio_length_ms=800"]
        assert generate.run([*chosen, *common, *out]) == 0
        codes.append(np.load(tmp_path / "x.npy"))
    np.testing.assert_array_equal(*codes)


def test_from_scratch_initializes_the_language_model_alone(run, shallow, data, tmp_path):
    """Its loss is at first that of a guess, or more."""
    out = tmp_path / "run"
    assert run(f"--data={data}", "--steps=2", "--from_scratch", f"--out={out}") == 0
    guess = 2 * np.log(CONFIG.audio_vocab_size)
    assert 0.9 * guess < metrics(out)[0]["loss"] < 2 * guess
    ours = dict(native_format.read_params(out / "model", MODEL))
    before = csm_jax.load(shallow)
    given = native_format.flatten({"csm": before.params})
    assert not any(np.allclose(ours[path], leaf) for path, leaf in given.items() if leaf.ndim > 1)
    assert csm_jax.load(out / "model").codec.fingerprint == before.codec.fingerprint


def test_lines_with_problems_end_the_run_or_are_left_out(run, data, tmp_path, capsys):
    mixed = data.with_name("mixed.jsonl")
    mixed.write_text(
        "{\n" + data.read_text() + '[{"speaker": 0, "text": "", "audio": "0-0.wav"}]\n'
    )
    out = tmp_path / "run"
    assert run(f"--data={mixed}", "--steps=1", f"--out={out}") == 2
    error = capsys.readouterr().err
    assert f"{mixed}, line 1: not JSON" in error
    assert f"{mixed}, line 6: turn 1: the text is empty" in error
    assert "2 of 6 conversations" in error
    assert not out.exists()
    assert run(f"--data={mixed}", "--steps=2", f"--out={out}", "--on_bad_data=skip") == 0


def test_losses_of_each_speaker_add_up_to_those_of_all(run, data, capsys):
    """Weighed by the numbers of their frames."""

    def losses(*flags: str) -> dict:
        capsys.readouterr()
        assert run(f"--data={data}", "--eval_only", "--on_bad_data=skip", *flags) == 0
        return json.loads(capsys.readouterr().out)

    both, parts = losses(), [losses(f"--speakers={speaker}") for speaker in (0, 1)]
    assert both["num_frames"] == sum(part["num_frames"] for part in parts) == 17 + 6
    for name in ("backbone_loss", "depth_decoder_loss"):
        weighed = sum(part[name] * part["num_frames"] for part in parts)
        assert weighed == pytest.approx(both[name] * both["num_frames"], rel=1e-5)


def test_optimiser_is_an_alias_of_optimizer():
    values = flags.FlagValues()
    training_flags.define_flags(values)
    values(["finetune", "--optimiser=muon"])
    assert values.optimizer == "muon"
    assert training_flags.read_settings(values)["optimizer"] == "muon"
    assert "optimiser" not in training_flags.read_settings(values)
