"""Serves speech over HTTP.

    python -m csm_jax.serve --checkpoint=demo --port=8000
    curl localhost:8000/v1/audio/speech -H "Content-Type: application/json" \\
        -d '{"model": "csm-1b", "input": "one two three", "voice": "alloy"}' -o speech.mp3

API keys are in CSM_JAX_API_KEYS, with commas between, or in --api_keys_file, one a line; the secret
that signs webhooks is in CSM_JAX_WEBHOOK_SECRET. Without API keys requests need none.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from csm_jax import cli, sampling_flags
from csm_jax.errors import CSMError, InputError
from csm_jax.loading import NAMES

if TYPE_CHECKING:
    from csm_jax.serve.deadline import Deadline
    from csm_jax.serve.settings import Settings

PROGRAM = "csm_jax.serve"
KEYS_VARIABLE = "CSM_JAX_API_KEYS"


def define_flags(values: flags.FlagValues) -> None:
    def define(kind: Callable, name: str, default: object, help: str, **kwargs: object) -> None:
        kind(name, default, help, flag_values=values, **kwargs)

    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    flag, listed, real = flags.DEFINE_boolean, flags.DEFINE_list, flags.DEFINE_float
    define(text, "checkpoint", "sesame/csm-1b", f"hub name, directory, {' or '.join(NAMES)}")
    define(text, "adapters", None, "directory of LoRA adapters")
    define(text, "dtype", "auto", "auto, float32, bfloat16 or float16")
    define(text, "quantize", None, "none or int8; default: as the checkpoint is stored")
    define(text, "host", "127.0.0.1", "address to listen at; 0.0.0.0 is all of this machine's")
    define(whole, "port", 8000, "port to listen at", lower_bound=0, upper_bound=65535)
    define(text, "ssl_certfile", None, "certificate, to speak https")
    define(text, "ssl_keyfile", None, "its private key")
    define(text, "model_name", "csm-1b", "what the APIs call the model")
    define(whole, "max_batch", 8, "requests that speak at once", lower_bound=1)
    define(whole, "max_seq_len", 2048, "positions of each, context and speech", lower_bound=32)
    define(whole, "max_queue", 64, "requests that may wait", lower_bound=1)
    # Of requests that do not say it.
    sampling_flags.define_flags(values)
    define(text, "voices", None, "directory of presets: NAME.flac and NAME.txt, its transcript")
    define(text, "data", None, "directory of what outlives the process; default: nothing does")
    define(text, "api_keys_file", None, "lines KEY [tenant=NAME] [weight=NUMBER]")
    define(whole, "requests_per_minute", 0, "and utterances, of a caller; 0: any", lower_bound=0)
    define(whole, "speech_seconds_per_minute", 0, "of one caller; 0: any", lower_bound=0)
    define(real, "drain_seconds", 60.0, "from SIGTERM until the process is gone", lower_bound=1.0)
    define(flag, "fetch_urls", False, "fetch recordings from addresses in requests")
    define(flag, "allow_private", False, "also from private networks; webhooks too")
    define(listed, "cors_origins", [], "of web pages that may send requests; * is any")
    define(listed, "allowed_hosts", [], "further names of this server in Host; * is any")
    define(listed, "trusted_proxies", [], "addresses or networks that X-Forwarded-For is taken of")


def main(values: flags.FlagValues) -> None:
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
    listening = _listen(values.host, values.port, BACKLOG)
    app = load_app(values.checkpoint, settings, values.dtype, values.quantize, values.adapters)
    _log_to_stderr()
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
    """Ends the process at the deadline, whatever a thread of it is doing then."""

    def end() -> None:
        logging.getLogger("csm_jax.serve").error(
            "not everything was over within %g s (--drain_seconds): the process ends",
            deadline.seconds,
        )
        os._exit(1)

    timer = threading.Timer(deadline.left, end)
    timer.daemon = True
    timer.start()


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    """Before the model is loaded, which takes a while."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot listen at {host}, port {port} ({reason}): name another"
        ) from error


def _settings(values: flags.FlagValues) -> "Settings":
    from csm_jax.serve.settings import Settings

    return Settings(
        model_name=values.model_name,
        sampling=sampling_flags.read_flags(values),
        max_batch=values.max_batch,
        max_seq_len=values.max_seq_len,
        max_queue=values.max_queue,
        voices=Path(values.voices) if values.voices else None,
        data=Path(values.data) if values.data else None,
        api_keys=_keys(values),
        requests_per_minute=values.requests_per_minute,
        speech_seconds_per_minute=values.speech_seconds_per_minute,
        drain_seconds=values.drain_seconds,
        fetch_urls=values.fetch_urls,
        allow_private=values.allow_private,
        cors_origins=tuple(values.cors_origins),
        allowed_hosts=(values.host, *values.allowed_hosts),
        trusted_proxies=tuple(values.trusted_proxies),
        webhook_secret=os.environ.get("CSM_JAX_WEBHOOK_SECRET", ""),
    )


def _log_to_stderr() -> None:
    """The server's own lines and uvicorn's; absl has the root's handler, and says other things."""
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
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name} cannot be read: {error}") from error
        lines += _some_keys(read_keys(text), name)
    parse_keys(lines)
    return tuple(lines)


def _some_keys(lines: list[str], source: str) -> list[str]:
    if not any(lines):
        raise InputError(f"{source} has no key: write one, or do not set it")
    return [line for line in lines if line]


def _check(values: flags.FlagValues) -> None:
    """What can be said before the model is loaded."""
    from csm_jax.serve.middleware.host_and_origin import check_names, check_origins
    from csm_jax.serve.network.addresses import check_proxies

    checks = {"allowed_hosts": check_names, "cors_origins": check_origins}
    for name, check in (checks | {"trusted_proxies": check_proxies}).items():
        try:
            check(values[name].value)
        except ValueError as error:
            raise InputError(f"--{name}: {error}") from error
    if (values.ssl_certfile is None) != (values.ssl_keyfile is None):
        raise InputError("--ssl_certfile and --ssl_keyfile go together: give both")
    for name in ("ssl_certfile", "ssl_keyfile"):
        if values[name].value and not Path(values[name].value).is_file():
            raise InputError(f"--{name} is {values[name].value}, which is no file")


if __name__ == "__main__":
    raise SystemExit(cli.run(PROGRAM, __doc__, define_flags, main))
