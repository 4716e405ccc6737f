"""What the command lines share: flags, one-line errors, exit codes, the compilation cache."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import flags, logging
from huggingface_hub.utils import logging as hub_logging

from csm_jax.errors import CSMError
from csm_jax.hub import cache_directory

USAGE_ERROR = 2
# What ends a program from outside: a machine that shuts down, a terminal that closes.
_ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _Ended(BaseException):
    """A signal has told this program to end."""


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
        with _unwinding():
            main(values)
    except (CSMError, flags.Error) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130
    except _Ended as ended:
        return _die_of(ended.args[0])
    except BrokenPipeError:
        abandon_stdout()  # whoever listened has heard enough
    return 0


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """Lets signals that end the program unwind it first, so that it removes what is half written.

    Signals that are ignored, as under nohup, stay so.
    """

    def unwind(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one must not disturb the unwinding
        raise _Ended(number)

    def unwind_again(caught: "sys.UnraisableHookArgs") -> None:
        # Python drops what a handler raises while a weak reference or a destructor is cleared.
        if caught.exc_type is _Ended:
            number = caught.exc_value.args[0]
            signal.signal(number, unwind)
            # A moment later: what is raised in here would be dropped too.
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            hook(caught)

    is_main = threading.current_thread() is threading.main_thread()
    before = [each for each in _ENDINGS if is_main and signal.getsignal(each) == signal.SIG_DFL]
    for number in before:
        signal.signal(number, unwind)
    hook, sys.unraisablehook = sys.unraisablehook, unwind_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number in before:
            signal.signal(number, signal.SIG_DFL)


def _die_of(number: int) -> int:
    """Ends as if the signal had not been caught; returns a code where that has no effect."""
    os.kill(os.getpid(), number)
    return 128 + number  # process 1 of a container


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
