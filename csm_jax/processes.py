"""Several processes that work on one thing: which of them this is."""

import socket

import jax
from absl import flags

from csm_jax.errors import InputError

# A process that is done waits for the others, and jax would give them five minutes: a week.
SHUTDOWN_SECONDS = 7 * 24 * 3600


def define_flags(values: flags.FlagValues, purpose: str) -> None:
    """Those of `join`. `purpose` is what the processes do together."""
    coordinator = "host:port of process 0, if there are several; or auto"
    flags.DEFINE_string("coordinator", None, coordinator, flag_values=values)
    for name, default, help in (
        ("num_processes", 1, purpose),
        ("process_id", 0, "which of them this is, from 0"),
    ):
        flags.DEFINE_integer(name, default, help, lower_bound=default, flag_values=values)


def join(values: flags.FlagValues) -> tuple[int, int]:
    """Which process this is, and of how many; with a coordinator, jax knows of them too.

    Raises:
      InputError: there is no such process, or nobody at the coordinator's address.
    """
    if values.process_id >= values.num_processes:
        raise InputError(
            f"--process_id is {values.process_id}, but must be under --num_processes, "
            f"{values.num_processes}"
        )
    if values.coordinator is None:
        return values.process_id, values.num_processes
    arguments = {}
    if values.coordinator != "auto":
        _check_address(values.coordinator)
        arguments = dict(
            coordinator_address=values.coordinator,
            num_processes=values.num_processes,
            process_id=values.process_id,
        )
    try:
        jax.distributed.initialize(**arguments, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--coordinator {values.coordinator} cannot be joined: {error}") from error
    return jax.process_index(), jax.process_count()


def _check_address(address: str) -> None:
    """Here, because jax aborts the process for what is wrong with it."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--coordinator is {address}, but must be host:port, or auto")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, OverflowError) as error:
        raise InputError(f"--coordinator {address} cannot be found: {error}") from error
