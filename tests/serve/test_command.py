"""The errors of `python -m csm_jax.serve`."""

import socket
import subprocess
import sys

import pytest

from csm_jax.cli import flags as cli
from csm_jax.serve import __main__ as command
from csm_jax.serve.settings import Limits
from csm_jax.serve.store import Store


@pytest.fixture
def refuse(capsys):
    """The error of the command with invalid flags, which is one line."""

    def run(*flags: str) -> str:
        code = cli.run(command.PROGRAM, command.__doc__, command.define_flags, command.main, flags)
        output = capsys.readouterr()
        assert (code, output.out) == (2, "")
        assert output.err.count("\n") == 1
        return output.err

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prot=80"], "Unknown command line flag 'prot'"),
        (["demo"], "unexpected argument demo"),
        (["--port=99999"], "port"),
        (["--max_batch=0"], "max_batch"),
        (["--checkpoint=nowhere"], "checkpoint nowhere is neither"),
        (["--checkpoint=demo", "--temperature=0"], "temperature is 0"),
        (["--checkpoint=demo", "--ssl_certfile=a.pem"], "give both"),
        (["--checkpoint=demo", "--ssl_certfile=a", "--ssl_keyfile=b"], "a, which is no file"),
        (["--checkpoint=demo", "--api_keys_file=nowhere"], "nowhere cannot be read"),
        (["--checkpoint=demo", "--voices=/proc/none"], "/proc/none"),
        (["--checkpoint=demo", "--trusted_proxies=nginx"], "nginx"),
        (["--checkpoint=demo", "--trusted_proxies=10.0.0.1/8"], "10.0.0.1/8"),
        (["--checkpoint=demo", "--allowed_hosts=https://a.example"], "https://a.example"),
        (["--checkpoint=demo", "--cors_origins=a.example"], "a.example"),
        (["--checkpoint=demo", "--drain_seconds=0"], "drain_seconds"),
    ],
)
def test_errors_are_one_line(refuse, flags, message):
    assert message in refuse(*flags)


def test_a_keys_file_without_keys_is_refused(refuse, tmp_path):
    """It must not become a server without keys."""
    (tmp_path / "keys").write_text("\n  \n")
    assert "has no key" in refuse("--checkpoint=demo", f"--api_keys_file={tmp_path / 'keys'}")


@pytest.mark.parametrize("given", [" , ", ",", " ", "sk-1 tenant=", "sk-1,sk-1", "sk-\u00e9"])
def test_a_keys_variable_without_keys_is_refused(refuse, monkeypatch, given):
    monkeypatch.setenv("CSM_JAX_API_KEYS", given)
    assert "key" in refuse("--checkpoint=demo")


def test_a_missing_library_of_the_normalizer_is_refused_at_the_start(refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    assert "pip install 'csm-jax[normalize]'" in refuse("--checkpoint=demo", "--normalize")


def test_a_port_in_use_is_refused(refuse):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = refuse("--checkpoint=demo", f"--port={taken.getsockname()[1]}")
    assert "cannot listen at 127.0.0.1" in message


def test_a_data_directory_in_use_is_refused(refuse, tmp_path):
    store = Store(tmp_path, Limits())
    message = refuse("--checkpoint=demo", "--port=0", f"--data={tmp_path}")
    assert "in use by another server" in message
    store.close()


def test_a_damaged_database_is_refused(refuse, tmp_path):
    (tmp_path / "store.sqlite").write_bytes(b"no database " * 1000)
    message = refuse("--checkpoint=demo", "--port=0", f"--data={tmp_path}")
    assert f"{tmp_path}/store.sqlite cannot be used" in message
    assert "move it away" in message


def test_the_error_without_the_extra_names_it(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ImportError('gone', name='uvicorn')")
    done = subprocess.run(
        [sys.executable, "-m", "csm_jax.serve", "--checkpoint=demo"],
        env={"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "uvicorn is missing: pip install 'csm-jax[serve]'" in done.stderr


def test_help_lists_the_flags(capsys):
    assert cli.run(command.PROGRAM, command.__doc__, command.define_flags, None, ["--help"]) == 0
    listed = capsys.readouterr().out
    for flag in ("--port", "--api_keys_file", "--voices", "--max_queue"):
        assert flag in listed
