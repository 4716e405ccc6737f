"""Runs a command: its flags, errors, signals, output and compilation cache."""

import contextlib
import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from logging import CRITICAL, StreamHandler, getLogger
from typing import Any, TextIO

import jax
from absl import flags, logging
from huggingface_hub.utils import logging as hub_logging

from csm_jax.errors import CSMError, OutputError, first_line
from csm_jax.loading.hub import cache_directory

USAGE_ERROR = 2
HELP_WIDTH = 100
# In jax's warnings, which have no type of their own.
_CACHE_FAILURE = "persistent compilation cache"
# Signals that end a program from outside: a machine that shuts down, a terminal that closes, and
# its user.
_END_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)
]


def definer(values: flags.FlagValues) -> Callable[..., None]:
    """A function that defines a flag of one command: `define(flags.DEFINE_string, "out", None,
    "file to write")`, with further arguments by name."""

    def define(kind: Callable, name: str, default: object, help: str, **kwargs: object) -> None:
        kind(name, default, help, flag_values=values, **kwargs)

    return define


class _SignalError(SystemExit):
    """A signal has told this program to end.

    A `SystemExit`, because an event loop, such as Orbax's, goes on after any other exception.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def run(
    program: str,
    doc: str | None,
    define: Callable[[flags.FlagValues], None],
    main: Callable[[flags.FlagValues], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses flags and runs `main`; returns the exit code.

    An error whose message is meant for the user is one line on stderr and exit code 2. When the
    reader of a pipe has gone, such as `head`, the command ends without a message and with 0.
    """
    _open_closed_streams()
    try:
        return _run(program, doc, define, main, sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        return 0
    finally:
        _abandon_closed_pipes()


def _open_closed_streams() -> None:
    """Lets what is written to a closed standard stream go nowhere.

    Otherwise the next file that is opened gets its number, and with it the messages of libraries;
    and Python prints to standard output what is meant for a standard error of None.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, as long as the program


def _run(
    program: str,
    doc: str | None,
    define: Callable[[flags.FlagValues], None],
    main: Callable[[flags.FlagValues], None],
    argv: Sequence[str],
) -> int:
    values = flags.FlagValues()
    define(values)
    try:
        if "--help" in argv or "-h" in argv:
            show(f"{(doc or '').strip()}\n\nflags:\n{_describe(values)}")
            return 0
        _parse(values, program, argv)
        with _unwinding(), _plain_log(), _one_cache_warning():
            _check_directory()
            _prepare_jax()
            main(values)
    except (CSMError, flags.Error) as error:
        warn(f"{program}: error: {' '.join(str(error).split())}")
        return USAGE_ERROR
    except (RuntimeError, AssertionError):
        if (problem := _find_missing_device()) is None:
            raise
        warn(f"{program}: error: {problem}")
        return USAGE_ERROR
    except KeyboardInterrupt:  # before or after `main`
        return _end_by_signal(signal.SIGINT)
    except _SignalError as caught:
        return _end_by_signal(caught.number)
    return 0


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """Lets signals that end the program unwind it first, so that it removes partial files.

    Signals that are ignored, as under nohup, stay so.
    """

    def unwind(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one must not disturb the unwinding
        raise _SignalError(number)

    def unwind_again(caught: "sys.UnraisableHookArgs") -> None:
        # Python drops what a handler raises while a weak reference or a destructor is cleared.
        if isinstance(caught.exc_value, _SignalError):
            number = caught.exc_value.number
            signal.signal(number, unwind)
            # A moment later: what is raised in here would be dropped too.
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            hook(caught)

    is_main = threading.current_thread() is threading.main_thread()
    # Python's own handler of SIGINT raises a KeyboardInterrupt, which it then drops just so.
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    handlers = {number: signal.getsignal(number) for number in _END_SIGNALS if is_main}
    before = {number: each for number, each in handlers.items() if each in defaults}
    for number in before:
        signal.signal(number, unwind)
    hook, sys.unraisablehook = sys.unraisablehook, unwind_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_by_signal(number: int) -> int:
    """Ends as if the signal had not been caught; returns a code where that has no effect."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number  # process 1 of a container


def _parse(values: flags.FlagValues, program: str, argv: Sequence[str]) -> None:
    try:
        rest = values([program, *map(_expand_home, argv)])[1:]
    except flags.UnrecognizedFlagError as error:
        raise flags.Error(f"{error}; --help lists the flags") from error
    if rest:
        raise flags.Error(f"unexpected argument {rest[0]}: flags are written --name=value")


def _expand_home(argument: str) -> str:
    """`--out=~/a.wav` with the user's directory: shells replace `~` at the start of a word only."""
    name, equals, value = argument.partition("=")
    is_path = name.startswith("--") and value.startswith("~/")
    return name + equals + os.path.expanduser(value) if is_path else argument


def _describe(values: flags.FlagValues) -> str:
    wrap = textwrap.TextWrapper(
        HELP_WIDTH, initial_indent="  ", subsequent_indent=6 * " ", break_on_hyphens=False
    )
    lines = [f"--{name}: {values[name].help} (default: {values[name].value})" for name in values]
    return "\n".join(wrap.fill(line) for line in lines)


def _find_missing_device() -> str | None:
    """What is wrong with the platforms that the user wants jax to use; None if they are there.

    jax says it when they are used first, with errors of several types and without a text for CUDA.
    """
    wanted = jax.config.values["jax_platforms"]
    try:
        jax.devices()
    except Exception as error:
        return (
            f"JAX_PLATFORMS is {wanted!r}, which jax cannot use here ({first_line(error)}): unset "
            "it, or install what jax needs for it, such as pip install 'csm-jax[gpu]'"
        )
    return None


@contextlib.contextmanager
def _plain_log() -> Iterator[None]:
    """Prints the warnings of the library without absl's prefix."""
    logger, handler = getLogger("csm_jax"), StreamHandler(sys.stderr)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@contextlib.contextmanager
def _one_cache_warning() -> Iterator[None]:
    """Makes one line of jax's warnings, one for each program, that its cache cannot be used."""
    show_warning, is_told = warnings.showwarning, False

    def show_once(message: Warning | str, *arguments: Any, **named: Any) -> None:
        nonlocal is_told
        if _CACHE_FAILURE not in str(message):
            show_warning(message, *arguments, **named)
        elif not is_told:
            is_told = True
            reason = " ".join(str(message).rpartition("': ")[2].split())
            directory = jax.config.values["jax_compilation_cache_dir"]
            warn(
                f"the cache of compiled programs in {directory} cannot be used ({reason}): they "
                "are compiled again each time; CSM_JAX_CACHE names another directory"
            )

    warnings.showwarning = show_once
    try:
        yield
    finally:
        warnings.showwarning = show_warning


def _check_directory() -> None:
    """Raises `OutputError` if the working directory is gone, which ends libraries with a crash."""
    try:
        os.getcwd()
    except OSError as error:
        raise OutputError(
            f"the working directory cannot be used ({error.strerror}): change to another one"
        ) from error


def _prepare_jax() -> None:
    # Orbax logs every save and restore, the hub every retry. A failure in the end is an exception,
    # which `run` reports.
    logging.set_verbosity(logging.FATAL)
    hub_logging.set_verbosity(CRITICAL)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # In the user's own directory: anyone who can write to this cache can run code.
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    # By default only compilations of over a second are kept, and the codec's are shorter.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def show(text: str) -> None:
    """Prints on standard output, at once. Raises `OutputError` and `BrokenPipeError`."""
    with writing_stdout():
        print(text, flush=True)


def warn(message: str) -> None:
    """Prints on standard error; does nothing once its reader has gone."""
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr)


@contextlib.contextmanager
def writing_stdout() -> Iterator[None]:
    """Turns a failed write in the block into an `OutputError`; `BrokenPipeError` passes."""
    try:
        yield
    except BrokenPipeError:
        raise  # no failure: the reader has what it wanted
    except OSError as error:
        _abandon(sys.stdout)
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def _abandon_closed_pipes() -> None:
    """Discards the output to pipes without a reader, which Python would report when it exits."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except BrokenPipeError:
            _abandon(stream)


def _abandon(stream: TextIO) -> None:
    """Discards what a stream has not written yet, and all later output."""
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), stream.fileno())
