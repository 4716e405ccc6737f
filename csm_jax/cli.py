"""What the command lines share: flags, one-line errors, exit codes, the compilation cache."""

import os
import sys
from collections.abc import Callable, Sequence

import jax
from absl import flags, logging
from huggingface_hub.utils import logging as hub_logging

from csm_jax.errors import CSMError
from csm_jax.hub import cache_directory

USAGE_ERROR = 2


def run(
    program: str,
    doc: str,
    define: Callable[[flags.FlagValues], None],
    main: Callable[[flags.FlagValues], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses flags and runs `main`; returns the exit code.

    Whatever the user did wrong is one line on stderr and exit code 2.
    """
    values = flags.FlagValues()
    define(values)
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(f"{doc.strip()}\n\nflags:\n{_describe(values)}")
        return 0
    try:
        _parse(values, program, argv)
        _prepare_jax()
        main(values)
    except (CSMError, flags.Error) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        abandon_stdout()  # whoever listened has heard enough
    return 0


def _parse(values: flags.FlagValues, program: str, argv: Sequence[str]) -> None:
    try:
        rest = values([program, *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        raise flags.Error(f"{error}; --help lists the flags") from error
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]}: flags are written --name=value")


def _describe(values: flags.FlagValues) -> str:
    lines = [f"  --{name}: {values[name].help} (default: {values[name].value})" for name in values]
    return "\n".join(lines)


def _prepare_jax() -> None:
    # Orbax reports on every save and restore, the hub on every retry. What fails in the end is an
    # exception, and told by us.
    logging.set_verbosity(logging.FATAL)
    hub_logging.set_verbosity(hub_logging.CRITICAL)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # In the user's own directory: whoever can write to this cache can run code.
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    # By default only compilations of over a second are kept, and the codec's are shorter.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def abandon_stdout() -> None:
    """Lets Python forget what it could not write: it would try again at its end, and fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(message: str) -> None:
    print(message, file=sys.stderr)
