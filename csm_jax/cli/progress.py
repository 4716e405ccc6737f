"""Progress of the command line on a terminal: a bar and a summary."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from csm_jax.cli import flags as cli
from csm_jax.inference.generator import Generator


class Report:
    """The bar of each turn and the summary of all; silent unless stderr is a terminal."""

    def __init__(self, model: Generator):
        self._frame_s = model.config.frame_ms / 1000
        self._started = time.perf_counter()

    def turn(self) -> "_Bar":
        """The bar of the next turn, a context manager."""
        return _Bar(self._frame_s)

    def finish(self, out: str, num_frames: int) -> None:
        """Prints the summary of all turns."""
        if sys.stderr.isatty():
            elapsed = time.perf_counter() - self._started
            audio = num_frames * self._frame_s
            cli.warn(
                f"{out}: {num_frames} frames, {audio:.1f} s of audio, {_speed(elapsed, audio)}"
            )


@contextlib.contextmanager
def lines_bar(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[int], object]]]:
    """A bar over the lines of a manifest.

    Yields a function that prints a warning above the bar, and one that counts finished lines.
    """

    def warn(message: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            cli.warn(message)

    with tqdm(total=total, unit="line", disable=None, leave=False) as bar:
        yield warn, bar.update


class _Bar:
    """The frames of a turn; silent unless stderr is a terminal."""

    def __init__(self, frame_s: float):
        self._frame_s = frame_s
        self._started = time.perf_counter()
        self._bar = tqdm(unit="frame", disable=None, leave=False)

    def __enter__(self) -> Callable[[int], None] | None:
        return None if self._bar.disable else self._update

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _update(self, num_frames: int) -> None:
        audio = num_frames * self._frame_s
        elapsed = time.perf_counter() - self._started
        self._bar.set_postfix_str(f"{audio:.1f} s of audio, {_speed(elapsed, audio)}", False)
        self._bar.update(num_frames - self._bar.n)


def _speed(elapsed: float, audio: float) -> str:
    """The real-time factor and its inverse, with their names: both are in use."""
    if not audio:
        return f"{elapsed:.1f} s"
    return f"real-time factor {elapsed / audio:.2f} ({audio / elapsed:.2f} x real time)"
