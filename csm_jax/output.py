"""Where the command line's speech goes: a file, or standard output for players and pipes."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from csm_jax import cli
from csm_jax.audio import check_output, encode_audio, open_audio, save_audio, to_pcm, wav_header
from csm_jax.errors import InputError, OutputError
from csm_jax.files import check_file, replace_file, reporting

STDOUT = "-"
PIPE_FORMATS = ("wav", "pcm")

Write = Callable[[np.ndarray], None]


def check_out(out: str, form: str | None) -> None:
    """Raises `OutputError` or `InputError` if speech cannot go to `out`, before it is made.

    Args:
      form: the format for standard output; None is wav.
    """
    if out != STDOUT:
        if form is not None:
            raise InputError(f"--format is for --out=- and --manifest: {out} names its own")
        check_output(out)
        return
    if form is not None and form not in PIPE_FORMATS:
        raise InputError(f"--format is {form}, but --out=- takes wav or pcm")
    if sys.stdout is None:
        raise OutputError("--out=- needs standard output, which is closed")
    if sys.stdout.isatty():
        raise InputError(
            "--out=- would fill the terminal with samples: pipe it into a player, such as "
            "ffplay -nodisp -, or name a file"
        )


def check_codes_out(path: Path) -> None:
    """Raises `OutputError` if `save_codes` could not write `path`."""
    if path.suffix != ".npy":
        raise OutputError(f"codes are written as .npy, not to {path}")
    with reporting(f"{path} cannot be written"):
        check_file(path)


def save_speech(out: str, form: str | None, audio: np.ndarray, sample_rate: int) -> None:
    """Writes float32 [num_samples] as a whole."""
    if out == STDOUT:
        _write_to_pipe(encode_audio(audio, sample_rate, f".{form or 'wav'}"))
    else:
        save_audio(out, audio, sample_rate)


@contextlib.contextmanager
def open_speech(out: str, form: str | None, sample_rate: int) -> Iterator[Write]:
    """Gives a function that writes the next samples, float32 [n].

    A file appears when the block ends without an error; standard output has everything at once,
    but nothing before the first samples.
    """
    if out != STDOUT:
        with open_audio(out, sample_rate) as write:
            yield write
        return
    header = b"" if form == "pcm" else wav_header(sample_rate)

    def write_on(samples: np.ndarray) -> None:
        nonlocal header
        _write_to_pipe(header + to_pcm(samples))
        header = b""

    yield write_on
    if header:
        _write_to_pipe(header)


def save_codes(path: Path, codes: np.ndarray) -> None:
    """Writes int32 [num_frames, Q] as .npy, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, codes)
    with reporting(f"{path} could not be written"):
        replace_file(path, buffer.getvalue())


def _write_to_pipe(data: bytes) -> None:
    left = memoryview(data)
    try:
        while left:
            # Under PYTHONUNBUFFERED it may take only a part.
            left = left[sys.stdout.buffer.write(left) :]
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise  # no fault: whoever listened has heard enough
    except OSError as error:
        cli.abandon_stdout()
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error
