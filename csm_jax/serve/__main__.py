"""Serves speech over HTTP.

    python -m csm_jax.serve --checkpoint=demo --port=8000
    curl localhost:8000/v1/audio/speech -H "Content-Type: application/json" \\
        -d '{"model": "csm-1b", "input": "three one four one five", "voice": "alloy"}' -o speech.mp3

API keys are in CSM_JAX_API_KEYS, with commas between, or in --api_keys_file, one a line; the secret
that signs webhooks is in CSM_JAX_WEBHOOK_SECRET. Without API keys requests need none.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from csm_jax.cli import dataclass_flags, model_flags, watermark_flags
from csm_jax.cli import flags as cli
from csm_jax.cli.dataclass_flags import field_types
from csm_jax.errors import CSMError, InputError
from csm_jax.inference.engine_config import EngineConfig
from csm_jax.io.text import read_text
from csm_jax.model.sampling import Sampling
from csm_jax.prompt import normalizing
from csm_jax.serve.settings import Settings

if TYPE_CHECKING:
    from csm_jax.serve.deadline import Deadline

PROGRAM = "csm_jax.serve"
KEYS_VARIABLE = "CSM_JAX_API_KEYS"
ENGINE_FLAGS = ("max_batch", "max_seq_len", "max_queue")
# Fields that come from the environment, from a file, or from flags of their own.
_OTHER_SETTINGS = {"sampling", "api_keys", "webhook_secret", "limits", *ENGINE_FLAGS}
SETTINGS_FLAGS = [name for name in field_types(Settings) if name not in _OTHER_SETTINGS]
LOWER_BOUNDS = {"max_batch": 1, "max_seq_len": 32, "max_queue": 1, "drain_seconds": 1.0}
LOWER_BOUNDS |= {"requests_per_minute": 0, "speech_seconds_per_minute": 0, "max_best_of": 1}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""

    define = cli.definer(values)
    text = flags.DEFINE_string
    model_flags.define_flags(values)
    watermark_flags.define_flags(values)
    define(text, "host", "127.0.0.1", "address to listen at; 0.0.0.0 is all of this machine's")
    port = "port to listen at"
    define(flags.DEFINE_integer, "port", 8000, port, lower_bound=0, upper_bound=65535)
    define(text, "ssl_certfile", None, "certificate, to serve https")
    define(text, "ssl_keyfile", None, "its private key")
    define(text, "api_keys_file", None, "lines KEY [tenant=NAME] [weight=NUMBER]")
    dataclass_flags.define_flags(values, EngineConfig, ENGINE_FLAGS, LOWER_BOUNDS)
    dataclass_flags.define_flags(values, Settings, SETTINGS_FLAGS, LOWER_BOUNDS)
    # The defaults of requests.
    dataclass_flags.define_flags(values, Sampling)


def main(values: flags.FlagValues) -> None:
    """Serves until a signal stops the server. Raises `CSMError` if it cannot start."""
    try:
        from csm_jax.serve.app import load_app
        from csm_jax.serve.transport.server import BACKLOG, make_server
    except ImportError as error:
        message = f"{error.name} is missing: pip install 'csm-jax[serve]'"
        raise CSMError(message) from error
    # Files are readable for the user of the server only.
    os.umask(0o077)
    settings = _settings(values)
    _check(values)
    watermark = watermark_flags.read_watermark(values)
    listening = _listen(values.host, values.port, BACKLOG)
    model = (values.checkpoint, settings, values.dtype, values.quantize, values.adapters)
    app = load_app(*model, watermark, values.kernels)
    _log_to_stderr()
    watermark_flags.warn_if_unmarked(values, watermark)
    service = app.state.service

    def drain() -> None:
        # The deadline runs from the signal.
        service.drain()
        _end_by(service.deadline)

    server = make_server(app, settings, values.ssl_certfile, values.ssl_keyfile, drain)
    try:
        server.run([listening])
    finally:
        service.engine.close()


def _end_by(deadline: "Deadline") -> None:
    """Ends the process at the deadline, even if a thread of it is stuck."""

    def end() -> None:
        logging.getLogger("csm_jax.serve").error(
            "requests were still running after %g s (--drain_seconds): the process ends",
            deadline.seconds,
        )
        os._exit(1)

    timer = threading.Timer(deadline.left, end)
    timer.daemon = True
    timer.start()


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    """Opens the listening socket, before the model is loaded. Raises `InputError`."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot listen at {host}, port {port} ({reason}): name another"
        ) from error


def _settings(values: flags.FlagValues) -> Settings:
    names = [*ENGINE_FLAGS, *SETTINGS_FLAGS]
    if values.normalize:
        normalizing.check_library()
    given = dataclass_flags.read_flags(values, Settings, names)
    given["allowed_hosts"] = (values.host, *given["allowed_hosts"])
    return Settings(
        sampling=Sampling(**dataclass_flags.read_flags(values, Sampling)),
        api_keys=_keys(values),
        webhook_secret=os.environ.get("CSM_JAX_WEBHOOK_SECRET", ""),
        **given,
    )


def _log_to_stderr() -> None:
    """Sends the log lines of the server and of uvicorn to stderr, without absl's prefix."""
    handler = logging.StreamHandler(sys.stderr)
    for name in ("csm_jax.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


def _keys(values: flags.FlagValues) -> tuple[str, ...]:
    """The lines of both sources. Raises `InputError` for a source that is given but has no key.

    Otherwise a mistake in it would make a server that needs no key.
    """
    from csm_jax.serve.admission.api_keys import parse_keys, read_keys

    lines: list[str] = []
    # The empty string is what Docker Compose makes of a variable that is not set.
    if given := os.environ.get(KEYS_VARIABLE, ""):
        lines += _some_keys([key.strip() for key in given.split(",")], KEYS_VARIABLE)
    if (name := values.api_keys_file) is not None:
        lines += _some_keys(read_keys(read_text(Path(name))), name)
    parse_keys(lines)
    return tuple(lines)


def _some_keys(lines: list[str], source: str) -> list[str]:
    if not any(lines):
        raise InputError(f"{source} has no key: write one, or do not set it")
    return [line for line in lines if line]


def _check(values: flags.FlagValues) -> None:
    """Checks the flags before the model is loaded. Raises `InputError`."""
    from csm_jax.serve.middleware.host_and_origin import check_names, check_origins
    from csm_jax.serve.network.addresses import check_proxies

    checks = {"allowed_hosts": check_names, "cors_origins": check_origins}
    for name, check in (checks | {"trusted_proxies": check_proxies}).items():
        try:
            check(values[name].value or [])
        except ValueError as error:
            raise InputError(f"--{name}: {error}") from error
    if (values.ssl_certfile is None) != (values.ssl_keyfile is None):
        raise InputError("--ssl_certfile and --ssl_keyfile go together: give both")
    for name in ("ssl_certfile", "ssl_keyfile"):
        if (path := values[name].value) and not Path(path).is_file():
            raise InputError(f"--{name} is {path}, which is no file")


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
