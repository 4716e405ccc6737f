"""The same losses on one device, on eight, and in two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import fixtures
import numpy as np
import pytest

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    lengths = [(2 + i % 3, 3) if i % 2 else (5 + i % 4,) for i in range(24)]
    return fixtures.write_conversations(tmp_path_factory.mktemp("data"), lengths)


def start(data: Path, out: Path, *flags: str, devices: int = 1) -> subprocess.Popen:
    """A run in a process with this number of CPU devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    common = ["--checkpoint=random:tiny", "--batch_size=8", "--max_len=512", "--log_every=1"]
    common += ["--depth_share=0.3", "--eval_every=3", "--learning_rate=1e-3", f"--steps={STEPS}"]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "csm_jax.finetune",
            *common,
            f"--data={data}",
            f"--out={out}",
            *flags,
        ],
        env=os.environ | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def curve(*processes: subprocess.Popen, out: Path) -> dict[str, list[float]]:
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = "loss", "backbone_loss", "depth_loss", "grad_norm", "eval_loss"
    return {name: [line[name] for line in lines if name in line] for name in names}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    return curve(start(data, out), out=out)


def assert_same(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> None:
    for name, values in theirs.items():
        assert len(values) >= 2
        np.testing.assert_allclose(ours[name], values, rtol=1e-4, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("fsdp", [pytest.param(2, marks=pytest.mark.long), 8])
def test_eight_devices_have_the_losses_of_one(data, alone, tmp_path, fsdp):
    out = tmp_path / "run"
    assert_same(curve(start(data, out, f"--fsdp={fsdp}", devices=8), out=out), alone)


@pytest.mark.long
def test_two_processes_have_the_losses_of_one(data, alone, tmp_path):
    """Each process has two devices and half of every batch; parameters are divided over four."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2", "--fsdp=4", "--save_every=3"]
    both = [start(data, out, *flags, f"--process_id={i}", devices=2) for i in range(2)]
    assert_same(curve(*both, out=out), alone)
    assert (out / "model" / "config.json").is_file()


@pytest.mark.long
def test_a_run_can_be_resumed_on_other_devices(data, alone, tmp_path):
    """A checkpoint does not depend on the number of devices."""
    out = tmp_path / "run"
    process = start(data, out, "--fsdp=4", "--save_every=1", devices=8)
    while not (out / "checkpoints" / "2" / "commit_success.txt").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert_same(curve(start(data, out), out=out), alone)
