"""Output of the command line: speech to a file or to standard output, codes to a file."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from csm_jax.cli import flags as cli
from csm_jax.errors import InputError, OutputError
from csm_jax.io.audio import check_output, encode_audio, open_audio, save_audio, to_pcm, wav_header
from csm_jax.io.files import reporting
from csm_jax.io.outputs import check_writable, write_output

STDOUT = "-"
PIPE_FORMATS = ("wav", "pcm")

Write = Callable[[np.ndarray], None]


def check_out(out: str, audio_format: str | None) -> None:
    """Raises `OutputError` or `InputError` if `out` cannot be written, before any speech is made.

    Args:
      audio_format: the format for standard output; None is wav.
    """
    if out != STDOUT:
        if audio_format is not None:
            raise InputError(f"--format is for --out=- and --manifest: {out} names its own")
        check_output(out)
        return
    if audio_format is not None and audio_format not in PIPE_FORMATS:
        raise InputError(f"--format is {audio_format}, but --out=- takes wav or pcm")
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
        check_writable(path)


def save_speech(out: str, audio_format: str | None, audio: np.ndarray, sample_rate: int) -> None:
    """Writes float32 [num_samples] at once, when all of it is there. Raises `OutputError`."""
    if out == STDOUT:
        _write_to_pipe(encode_audio(audio, sample_rate, f".{audio_format or 'wav'}"))
    else:
        save_audio(out, audio, sample_rate)


@contextlib.contextmanager
def open_speech(out: str, audio_format: str | None, sample_rate: int) -> Iterator[Write]:
    """Yields a function that writes the next samples, float32 [n].

    A file appears when the block ends without an error. Standard output, and a pipe or device in
    place of the file, is written at once.
    """
    if out != STDOUT:
        with open_audio(out, sample_rate) as write:
            yield write
        return
    header = b"" if audio_format == "pcm" else wav_header(sample_rate)

    def write_next(samples: np.ndarray) -> None:
        nonlocal header
        _write_to_pipe(header + to_pcm(samples))
        header = b""

    yield write_next
    if header:
        _write_to_pipe(header)


def save_codes(path: Path, codes: np.ndarray) -> None:
    """Writes int32 [num_frames, Q] as .npy, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, codes)
    with reporting(f"{path} could not be written"):
        write_output(path, buffer.getvalue())


def _write_to_pipe(data: bytes) -> None:
    left = memoryview(data)
    with cli.writing_stdout():
        while left:
            # Under PYTHONUNBUFFERED it may take only a part.
            left = left[sys.stdout.buffer.write(left) :]
        sys.stdout.buffer.flush()
