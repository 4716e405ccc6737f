"""Processes that are forked from one that has imported jax and flax, which takes a second."""

import multiprocessing
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

_PROCESSES = multiprocessing.get_context("forkserver")
# Not what reads the environment when it is imported, as the hub's library does.
_PROCESSES.set_forkserver_preload(["flax.nnx"])
_SECONDS = 120


def run_code(
    code: str, arguments: Sequence[str], environment: Mapping[str, str], output: Path
) -> list[str]:
    """The lines that a program prints, in a process with this environment.

    jax has read its variables before: this is for programs to which they are nothing.

    Args:
      output: a file to create for what it prints.
    """
    given = textwrap.dedent(code), list(arguments), dict(environment), output
    process = _PROCESSES.Process(target=_execute, args=given)
    process.start()
    process.join(_SECONDS)
    assert process.exitcode == 0, process.exitcode
    return output.read_text().splitlines()


def _execute(code: str, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
    exec(code, {"__name__": "__main__"})  # noqa: S102, a literal of a test
