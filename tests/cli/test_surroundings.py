"""Commands in unusual surroundings: closed streams, missing devices, no home, full caches."""

import os
import shlex
import signal
import subprocess
import sys
import time
import wave

import numpy as np
import pytest
from fixtures import CONFIG

from csm_jax import generate
from csm_jax.io import audio
from csm_jax.io.samples import SAMPLE_RATE

COMMAND = [sys.executable, "-m", "csm_jax.generate", "--checkpoint=random:tiny", "--text=Hi."]
COMMAND += ["--guard=off", "--max_audio_length_ms=800"]
NOISE = "random:tiny: the weights are random, the sound is noise and not speech"
NUM_SAMPLES = 10 * CONFIG.codec.frame_size


def shell(redirections: str, *flags: str, **named) -> subprocess.CompletedProcess:
    """Runs the command with redirections of a shell; gives the bytes of what is not redirected."""
    script = ["/bin/bash", "-c", f'exec "$@" {redirections}', "bash", *COMMAND, *flags]
    return subprocess.run(script, capture_output=True, check=False, **named)


def run(*flags: str, environment: dict[str, str] | None = None, **named):
    variables = os.environ | (environment or {})
    return subprocess.run(
        [*COMMAND, *flags], capture_output=True, text=True, env=variables, check=False, **named
    )


def assert_complete(path) -> None:
    with wave.open(str(path)) as file:
        assert file.getnframes() == NUM_SAMPLES


# --- Closed streams -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redirections", "flags"),
    [("2>&-", ["--stream"]), ("<&-", []), (">&-", ["--stream"]), ("<&- >&- 2>&-", [])],
)
def test_a_file_is_complete_whatever_streams_are_closed(tmp_path, redirections, flags):
    done = shell(redirections, f"--out={tmp_path}/a.wav", *flags)
    assert (done.returncode, done.stdout) == (0, b"")
    assert_complete(tmp_path / "a.wav")


def test_without_stderr_no_message_is_inside_the_sound():
    done = shell("2>&-", "--out=-", "--format=pcm", "--stream")
    assert done.returncode == 0
    assert len(done.stdout) == 2 * NUM_SAMPLES


def test_an_error_without_stderr_has_its_exit_code(tmp_path):
    done = shell("2>&-", f"--out={tmp_path}/a.wav", "--top_k=0")
    assert (done.returncode, done.stdout) == (2, b"")


# --- Directories ----------------------------------------------------------------------------------


def test_a_path_of_a_flag_may_begin_with_the_home_directory(tmp_path, monkeypatch, capsys):
    """A shell replaces `~` at the beginning of a word, and not behind `--out=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert generate.run([*COMMAND[3:], "--out=~/gone/a.wav"]) == 2
    assert f"cannot be written in directory {tmp_path}/gone" in capsys.readouterr().err


def test_a_working_directory_that_is_gone_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    command = shlex.join([*COMMAND, f"--out={tmp_path}/a.wav"])
    script = f"cd {shlex.quote(str(tmp_path))}/gone && rmdir ../gone && exec {command}"
    done = subprocess.run(["/bin/bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: the working directory cannot be used" in done.stderr.splitlines()[-1]


# --- Devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cuda", "nonsense", "cuda,rocm"])
def test_a_device_that_is_not_there_is_one_line(tmp_path, platform):
    done = run(f"--out={tmp_path}/a.wav", environment={"JAX_PLATFORMS": platform})
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert line.startswith(f"csm_jax.generate: error: JAX_PLATFORMS is '{platform}'")
    assert "Traceback" not in done.stderr


def codes(tmp_path, name: str, environment: dict[str, str], *flags: str) -> np.ndarray:
    out = [f"--out={tmp_path}/{name}.wav", f"--codes_out={tmp_path}/{name}.npy"]
    done = run(*out, *flags, environment=environment)
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / f"{name}.npy")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--stream"], marks=pytest.mark.long),
        pytest.param(["--greedy"], marks=pytest.mark.long),
        pytest.param(["--quantize=int8"], marks=pytest.mark.long),
    ],
)
def test_codes_are_the_same_with_64_bit_numbers(tmp_path, flags):
    voice = tmp_path / "voice.wav"
    noise = 0.1 * np.random.default_rng(0).standard_normal(5 * CONFIG.codec.frame_size)
    audio.save_audio(voice, noise, SAMPLE_RATE)
    context = [f"--context_audio={voice}", "--context_text=Before.", *flags]
    wide = codes(tmp_path, "wide", {"JAX_ENABLE_X64": "1"}, *context)
    usual = codes(tmp_path, "usual", {"JAX_ENABLE_X64": "0"}, *context)
    np.testing.assert_array_equal(wide, usual)
    assert wide.dtype == usual.dtype == np.int32


def test_codes_do_not_depend_on_the_generator_that_jax_is_set_to(tmp_path):
    usual = codes(tmp_path, "usual", {})
    others = {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0"}
    np.testing.assert_array_equal(codes(tmp_path, "others", others), usual)


# --- Caches ---------------------------------------------------------------------------------------


def messages(done: subprocess.CompletedProcess) -> list[str]:
    lines = done.stderr.splitlines()
    return [line for line in lines if line != NOISE and not line.startswith("the speech was cut")]


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    environment = {"CSM_JAX_CACHE": str(tmp_path / "file")}
    done = run(f"--out={tmp_path}/a.wav", environment=environment)
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path / "a.wav")
    (line,) = messages(done)
    assert line.startswith(f"the cache of compiled programs in {tmp_path}/file/xla cannot be used")
    assert line.endswith("CSM_JAX_CACHE names another directory")


def test_a_full_cache_is_one_line(tmp_path):
    """A limit on the size of files fails like a full disk."""
    (tmp_path / "a.wav").symlink_to("/dev/null")
    limited = ["/bin/bash", "-c", 'ulimit -f 1 && exec "$@"', "bash", *COMMAND]
    environment = os.environ | {"CSM_JAX_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*limited, f"--out={tmp_path}/a.wav"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    (line,) = messages(done)
    assert os.strerror(27) in line


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_stream_leaves_no_partial_file(tmp_path, number):
    flags = ["--stream", "--max_audio_length_ms=160000", f"--out={tmp_path}/a.wav"]
    process = subprocess.Popen([*COMMAND, *flags], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 10_000 for path in tmp_path.glob(".*.partial")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == -number
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert os.listdir(tmp_path) == []


ENDED_IN_A_LOOP = """
import asyncio, os, signal, sys
from csm_jax.cli import flags

async def wait():
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
    await asyncio.sleep(60)

sys.exit(flags.run("program", "", lambda values: None, lambda values: asyncio.run(wait()), []))
"""


def test_a_signal_in_the_callback_of_an_event_loop_ends_the_program():
    assert ended(ENDED_IN_A_LOOP) == (-signal.SIGTERM, b"")


ENDED_IN_A_DESTRUCTOR = """
import os, signal, sys, time
from csm_jax.cli import flags

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.NAME)
        time.sleep(0.1)

def main(values):
    Last()
    time.sleep(60)

sys.exit(flags.run("program", "", lambda values: None, main, []))
"""


@pytest.mark.usefixtures("heeded_signals")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_a_signal_in_a_destructor_ends_the_program(name):
    """Python drops what is raised there, a KeyboardInterrupt too."""
    assert ended(ENDED_IN_A_DESTRUCTOR.replace("NAME", name)) == (-getattr(signal, name), b"")


def ended(code: str) -> tuple[int, bytes]:
    """The exit code of a program, and what it writes to stderr."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, timeout=40, check=False)
    return done.returncode, done.stderr
