"""Several processes that share the work of one command."""

import functools
import socket

import jax
from absl import flags

from csm_jax.errors import InputError

# A process that has finished waits for the others. A week: jax's default is five minutes.
SHUTDOWN_SECONDS = 7 * 24 * 3600


def define_flags(values: flags.FlagValues, purpose: str) -> None:
    """Defines the flags of `join`. `purpose` says what the processes do together."""
    coordinator = "host:port of process 0, if there are several; or auto"
    flags.DEFINE_string("coordinator", None, coordinator, flag_values=values)
    for name, default, help in (
        ("num_processes", 1, f"processes {purpose}"),
        ("process_id", 0, "index of this process, from 0"),
    ):
        flags.DEFINE_integer(name, default, help, lower_bound=default, flag_values=values)


def join(values: flags.FlagValues) -> tuple[int, int]:
    """Returns the index of this process and their number.

    With a coordinator, jax is initialized for all of them.

    Raises:
      InputError: the index is out of range, or the coordinator cannot be reached.
    """
    if values.process_id >= values.num_processes:
        raise InputError(
            f"--process_id is {values.process_id}, but must be under --num_processes, "
            f"{values.num_processes}"
        )
    if values.coordinator is None:
        return values.process_id, values.num_processes
    if values.coordinator == "auto":
        initialize = jax.distributed.initialize
    else:
        _check_address(values.coordinator)
        initialize = functools.partial(
            jax.distributed.initialize,
            coordinator_address=values.coordinator,
            num_processes=values.num_processes,
            process_id=values.process_id,
        )
    try:
        initialize(shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--coordinator {values.coordinator} cannot be joined: {error}") from error
    return jax.process_index(), jax.process_count()


def _check_address(address: str) -> None:
    """Raises `InputError` for an address that jax would abort the process for."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--coordinator is {address}, but must be host:port, or auto")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, OverflowError) as error:
        raise InputError(f"--coordinator {address} cannot be found: {error}") from error
