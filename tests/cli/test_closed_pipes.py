"""A pipe whose reader has gone, such as `head`, ends every command without a message."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("uvicorn")

# Standard output is a pipe without a reader; stderr tells what went wrong.
ALL_COMMANDS = """
import json, os, sys
from csm_jax import benchmark, finetune, generate
from csm_jax.cli import flags as cli
from csm_jax.convert import __main__ as convert
from csm_jax.serve import __main__ as serve

closed = os.dup(1)

def code_of(run):
    os.dup2(closed, 1)
    return run()

def lines(values):
    for number in range(3):
        cli.show(json.dumps({"number": number}))
    print("not reached", file=sys.stderr)

def unflushed(values):
    print("a line that is still in the buffer")

def stub(main):
    return lambda: cli.run("stub", "A stub.", lambda values: None, main, [])

runs = [lambda each=each: each.run(["--help"]) for each in
        (generate, convert, benchmark, finetune, serve)]
codes = [code_of(run) for run in [*runs, stub(lines), stub(unflushed)]]
sys.exit(0 if codes == [0] * 7 else f"exit codes {codes}")
"""


@pytest.fixture
def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_every_command_ends_quietly_when_its_output_is_not_read(closed_pipe):
    """`--help` of all five, JSON lines, and text that Python would flush at its end."""
    done = subprocess.run(
        [sys.executable, "-c", ALL_COMMANDS], stdout=closed_pipe, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_into_head_is_quiet():
    script = f"{sys.executable} -m csm_jax.generate --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["Speaks text from the command line.", "0"]
    assert done.stderr == ""


def test_an_error_has_its_exit_code_when_stderr_is_not_read(closed_pipe, tmp_path):
    command = [sys.executable, "-m", "csm_jax.generate", "--text=Hi.", f"--out={tmp_path}/a.wav"]
    done = subprocess.run([*command, "--top_k=0"], stdout=subprocess.PIPE, stderr=closed_pipe)
    assert (done.returncode, done.stdout) == (2, b"")


def test_help_to_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "csm_jax.generate", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("csm_jax.generate: error: standard output cannot be written: No")
    assert done.stderr.count("\n") == 1
